"""Write the newest recorded results between the README's markers: `python bench/table.py`."""

import json
from pathlib import Path

BENCH = Path(__file__).resolve().parent
README = BENCH.parent / "README.md"
START, END = "<!-- bench/table.py writes from here -->", "<!-- to here -->"


def table(record: dict) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    lines = [
        f"{record['processor']}, {record['threads']} threads; {packages}; {record['time'][:10]}.",
        "Medians, and half the interquartile range.",
        "",
        "| case | ours, ms | peer, ms | peer / ours |",
        "|---|---|---|---|",
    ]
    for race in record["races"]:
        op, _, case = race["name"].removeprefix("test_").rstrip("]").partition("[")
        ours = f"{race['ours_ms']:.2f} ± {race['ours_spread']:.0%}"
        peer = f"{race['peer_ms']:.2f} ± {race['peer_spread']:.0%}"
        case = case.replace("torch.", "").replace("-", " · ")
        lines.append(f"| {op}: {case} | {ours} | {peer} | {race['ratio']:.1f} × |")
    return "\n".join(lines)


def main() -> None:
    newest = max((BENCH / "results" / "cpu").glob("*.json"))
    before, rest = README.read_text("utf-8").split(START)
    _, after = rest.split(END)
    text = f"{before}{START}\n{table(json.loads(newest.read_text()))}\n{END}{after}"
    README.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
