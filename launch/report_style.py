"""The looks of the report's page: one sheet, light and dark. Used by `launch.report_page`."""

_LIGHT = """
--page:#f7f8f9; --card:#ffffff; --ink:#22282e; --soft:#5a6570; --line:#dde2e6; --good:#0f7a55; --bad:#b3123f;
--alive:#3f8f6f; --healing:#c98a00; --joining:#8fb3d9; --waiting:#d6dde3; --starting:#e6eaee; --stopped:#7d4aa8;
--q1:#0b62a8; --q2:#c98a00; --q3:#3f8f6f; --own:#0b62a8; --ref:#c2410c; --band:#f3d9d0; --heat:11,98,168;
"""
_DARK = """
--page:#101418; --card:#171c21; --ink:#e6eaee; --soft:#a3aeb8; --line:#2b333a; --good:#4fd1a1; --bad:#ff8aa8;
--alive:#3fa37f; --healing:#e0a93a; --joining:#5f86b3; --waiting:#36414a; --starting:#262e35; --stopped:#b285dd;
--q1:#6cb8ff; --q2:#e6c84a; --q3:#4fd1a1; --own:#6cb8ff; --ref:#ff9d5c; --band:#4a2a24; --heat:108,184,255;
"""
STYLE = (
    f":root {{ color-scheme: light dark; {_LIGHT} }} @media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}"
    """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
header { position: relative; padding: 6px 0 4px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 17px; margin: 0 0 12px; }
.verdict { float: right; margin: 2px 0 0; padding: 3px 14px; border-radius: 14px; color: var(--card);
  font-weight: 600; }
.verdict.good { background: var(--good); }
.verdict.bad { background: var(--bad); }
.verdict.none { background: var(--soft); }
.note { color: var(--soft); font-size: 13px; margin: 4px 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px; margin: 16px 0 4px; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; }
dt { color: var(--soft); font-size: 12px; }
dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px;
  margin-top: 16px; }
.wide { overflow-x: auto; } .wide svg { display: block; width: 100%; min-width: 760px; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 4px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
thead th { color: var(--soft); font-weight: 500; }
td.text { text-align: left; white-space: normal; min-width: 320px; }
td.good { color: var(--good); }
td.bad { color: var(--bad); }
.heat td { background: rgba(var(--heat), calc(var(--share, 0) * .35)); border: 1px solid var(--line); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  padding: 12px; background: var(--page); border-radius: 8px; font-size: 13px; }
.key { display: inline-block; margin: 0 16px 4px 0; font-size: 13px; color: var(--soft); }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
svg text { fill: var(--ink); font: 12px system-ui, "Segoe UI", Roboto, sans-serif; }
svg .tick { fill: var(--soft); }
svg .name { text-anchor: end; }
svg .mark { font-weight: 700; text-anchor: middle; }
svg .glyph { fill: var(--card); stroke: var(--bad); stroke-width: 1.4; }
.grid { stroke: var(--line); }
.band { fill: var(--band); }
.gone { stroke: var(--bad); stroke-width: 2; fill: none; }
.world { fill: none; stroke: var(--own); stroke-width: 1.8; } .work { fill: var(--alive); opacity: .75; }
.loss { fill: none; stroke: var(--own); stroke-width: 1.8; }
.reference { fill: none; stroke: var(--ref); stroke-width: 5; opacity: .45; }
.own { background: var(--own); } .ref { background: var(--ref); }
"""
    + "".join(
        f".{name} {{ fill: var(--{name}); background: var(--{name}); }} "
        for name in ("alive", "healing", "joining", "waiting", "starting", "stopped", "q1", "q2", "q3")
    )
)
