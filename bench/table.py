"""Tables in the README, and plots beside the records, from each device's newest record.

python -m bench.table
"""

from pathlib import Path
from typing import Any

from bench.records import RESULTS, newest
from tossup.autotune.races import OURS
from tossup.supernet.files import write_atomically

README = RESULTS.parents[1] / "README.md"
START, END = "<!-- bench/table.py writes from here -->", "<!-- to here -->"


def entrants(race: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Those that were timed, ours first."""
    return [(name, e) for name, e in race["entrants"].items() if "untimed" not in e]


def markdown(record: dict[str, Any]) -> str:
    """Heading and table: a line for each race and peer; a race without one has a line as well."""
    versions = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    threads = ""
    if "threads" in record:
        threads = f", threads: {record['threads']}, load {record['load']:.1f} on {record['cores']}"
    commit = f", commit {record['commit']}" if record.get("commit") else ""
    on_gpu = "threads" not in record
    extra = [" ours, TFLOP/s | of the floor |", "---|---|"] if on_gpu else ["", ""]
    lines = [
        f"{record['device']}{threads}; {versions}; {record['time'][:10]}{commit}. "
        "Medians, and from 20 % to 80 % of the runs.",
        "",
        f"| case | ours, ms | peer | peer, ms | peer / ours |{extra[0]}",
        f"|---|---|---|---|---|{extra[1]}",
    ]
    races = [race for race in record["races"] if "failed" not in race]
    for race in races:
        (_, ours), *peers = entrants(race)
        more = ""
        if on_gpu:
            share = f"{ours['share']:.0%}" if ours["share"] else "–"
            more = f" {ours['tflops']:.0f} | {share} |" if ours["tflops"] else f" – | {share} |"
        case = f"{race['workload']}, {race['direction']}"
        for name, peer in peers or [("none", None)]:
            theirs = f"{times(peer)} | {digits(peer['ratio'])} ×" if peer else "– | –"
            lines.append(f"| {case} | {times(ours)} | {name} | {theirs} |{more}")
    untimed = {
        f"{name} ({entrant['untimed']})"
        for race in races
        for name, entrant in race["entrants"].items()
        if "untimed" in entrant
    } | {
        f"{r['workload']}, {r['direction']} ({r['failed']})"
        for r in record["races"]
        if r not in races
    }
    if untimed:
        lines += ["", f"Not timed: {'; '.join(sorted(untimed))}."]
    return "\n".join(lines)


def times(entrant: dict[str, Any]) -> str:
    median, p20, p80 = (entrant[key] * 1e3 for key in ("median", "p20", "p80"))
    return f"{digits(median)} ({digits(p20)}–{digits(p80)})"


def digits(number: float) -> str:
    short = f"{number:.3g}"
    return f"{number:.0f}" if float(short) >= 1000 else short


def plot(record: dict[str, Any], folder: Path) -> list[Path]:
    """One SVG for each op: how much longer each peer takes, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tossup"  # the same record gives the same bytes
    from matplotlib import pyplot

    paths = []
    races = [race for race in record["races"] if "failed" not in race]
    for op in dict.fromkeys(race["workload"].partition(" ")[0] for race in races):
        bars = [
            (f"{race['workload'].partition(' ')[2]}\n{race['direction']}: {name}", e["ratio"])
            for race in races
            if race["workload"].startswith(f"{op} ")
            for name, e in entrants(race)
            if name != OURS
        ]
        if not bars:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.45 * len(bars)), layout="constrained")
        labels, ratios = zip(*reversed(bars), strict=True)
        axes.barh(labels, ratios, color="#4878a8")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(f"{op} on {record['device']}")
        axes.set_xlabel("time of the peer / time of ours")
        paths.append(folder / f"{op}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def main() -> None:
    folders = sorted({path.parent for path in RESULTS.glob("*/*.json")})
    if not folders:
        raise SystemExit(f"{RESULTS} holds no record: `python -m bench.record` makes one")
    records = {folder: newest(folder) for folder in folders}
    tables = "\n\n".join(markdown(record) for record in records.values())
    before, rest = README.read_text("utf-8").split(START)
    _, after = rest.split(END)
    write_atomically(README, f"{before}{START}\n{tables}\n{END}{after}")
    for folder, record in records.items():
        for path in plot(record, folder):
            print(path)


if __name__ == "__main__":
    main()
