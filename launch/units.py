"""Numbers with units, for people: sizes in powers of 1024, times and rates in powers of 1000, three digits."""


def size(count: float) -> str:
    """Bytes as "1 GiB", "64 KiB" or "100 B"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{_digits(count / scale)} {unit}"
    return f"{_digits(count)} B"


def duration(seconds: float) -> str:
    """Seconds as "1.5 s", "12 ms" or "3.2 µs"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale * 0.9995:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds * 1e9)} ns"


def rate(per_second: float) -> str:
    """Bytes a second as "12.5 GB/s"."""
    for unit, scale in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if per_second >= scale * 0.9995:
            return f"{_digits(per_second / scale)} {unit}"
    return f"{_digits(per_second)} B/s"


def _digits(value: float) -> str:
    """Three significant digits, without trailing zeros, never as a power of ten."""
    if value >= 100:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if "e" in text else text
