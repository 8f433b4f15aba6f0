"""The looks of the report's page: one sheet, light and dark. Used by `launch.report_page`."""

_LIGHT = """
--page:#f7f8f9; --card:#ffffff; --ink:#22282e; --soft:#5a6570; --line:#dde2e6; --good:#0f7a55; --bad:#b3123f;
--alive:#3f8f6f; --healing:#c98a00; --joining:#8fb3d9; --waiting:#b4bfc9; --starting:#d9dfe4;
--stopped:#7d4aa8; --cut:#c2410c;
--q1:#0b62a8; --q2:#c98a00; --q3:#3f8f6f; --own:#0b62a8; --ref:#c2410c; --band:#f3d9d0; --heat:11,98,168;
"""
_DARK = """
--page:#101418; --card:#171c21; --ink:#e6eaee; --soft:#a3aeb8; --line:#2b333a; --good:#4fd1a1; --bad:#ff8aa8;
--alive:#3fa37f; --healing:#e0a93a; --joining:#5f86b3; --waiting:#4c5965; --starting:#303a43;
--stopped:#b285dd; --cut:#ff9d5c;
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
.tools { margin: 0 0 10px; } .tools .note { margin-left: 10px; }
.tools button { font: inherit; font-size: 13px; min-width: 32px; padding: 3px 9px; margin: 0 4px 4px 0;
  color: var(--ink); background: var(--page); border: 1px solid var(--line); border-radius: 6px; cursor: pointer; }
.time { display: grid; grid-template-columns: max-content minmax(0, 1fr); column-gap: 10px; row-gap: 12px; }
.labels { text-align: right; font-size: 12px; white-space: nowrap; }
.labels.faults { font-size: 11px; color: var(--soft); }
.scale { display: flex; flex-direction: column; justify-content: space-between; color: var(--soft); line-height: 1; }
.plot { position: relative; touch-action: pan-y; cursor: crosshair; }
.zoomed { display: block; width: 100%; background: var(--page); border-radius: 4px; }
.over { position: absolute; inset: 0; overflow: hidden; pointer-events: none; }
.over .grid { position: absolute; top: 0; bottom: 0; border-left: 1px solid var(--line); }
.over b { position: absolute; width: 15px; height: 15px; margin: -8px 0 0 -8px; border: 1.4px solid var(--bad);
  border-radius: 50%; background: var(--card); font-size: 10px; line-height: 12.5px; text-align: center; }
.over .chosen { position: absolute; top: 0; bottom: 0; background: var(--own); opacity: .25; }
.ticks { grid-column: 2; position: relative; height: 16px; margin-top: -8px; font-size: 12px; color: var(--soft); }
.ticks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.tip { position: fixed; z-index: 9; max-width: min(420px, 92vw); padding: 6px 10px; white-space: pre-line;
  pointer-events: none; font-size: 13px; background: var(--ink); color: var(--page); border-radius: 6px; }
.bars button { display: grid; grid-template-columns: 72px minmax(0, 300px) minmax(0, 1fr) 62px; gap: 10px; width: 100%;
  font: inherit; font-size: 13px; color: var(--ink); background: none; border: 0; padding: 3px 0; text-align: left;
  cursor: pointer; align-items: center; }
.bars button:hover, .bars button:focus-visible { background: var(--page); }
.bars .when, .bars .long { text-align: right; font-variant-numeric: tabular-nums; }
.bars .what { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bars .bar { display: flex; height: 14px; } .bars .bar i { height: 14px; }
@media (max-width: 600px) { .bars button { grid-template-columns: 60px minmax(0, 1fr) 58px; gap: 2px 8px; }
  .bars .bar { grid-column: 1 / -1; order: 1; margin-bottom: 4px; } .tools .note { display: block; margin: 2px 0; } }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 4px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
thead th { color: var(--soft); font-weight: 500; }
td.text { text-align: left; white-space: normal; min-width: min(320px, 50vw); }
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
.grid { stroke: var(--line); }
.band { fill: var(--band); background: var(--band); }
svg .end, .fault, .strokes, .world { fill: none; vector-effect: non-scaling-stroke; }
svg .end { stroke: var(--bad); stroke-width: 2.5; } i.end { background: var(--bad); width: 3px !important; }
.dense .fault { display: none; } .time.dense .end { stroke-width: 1; }
.fault { stroke: var(--ink); stroke-width: 1; } .strokes { stroke: var(--ink); stroke-width: 1; opacity: .7; }
.world { stroke: var(--own); stroke-width: 1.8; } svg .work { fill: var(--alive); opacity: .75; }
th.median { text-align: center; }
.loss { fill: none; stroke: var(--own); stroke-width: 1.8; }
.reference { fill: none; stroke: var(--ref); stroke-width: 5; opacity: .45; }
.own { background: var(--own); } .ref { background: var(--ref); }
"""
    + "".join(
        f".{name} {{ fill: var(--{name}); background: var(--{name}); }} "
        for name in ("alive", "healing", "joining", "waiting", "starting", "stopped", "q1", "q2", "q3")
    )
    + ".cut-off { fill: var(--cut); background: var(--cut); }"
)
