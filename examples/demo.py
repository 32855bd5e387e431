"""The whole chain on associative recall, with an answer that can be checked: `make demo`.

Trains a four-layer supernet {attention, mamba}, scores all its 16 placements, searches with one
attention layer allowed, compares the search with brute force, exports the winner and reloads it.
Leaves search.json, placements.json, export/ and report.png under the run's folder.
"""

import json
import sys
import time
from pathlib import Path

import torch

from tossup.supernet.config import RunConfig
from tossup.supernet.conversion import load_checkpoint, save_checkpoint
from tossup.supernet.data import build_data
from tossup.supernet.evaluate import evaluate_model, evaluate_placements
from tossup.supernet.files import write_atomically
from tossup.supernet.loader import load_config
from tossup.supernet.search import Placement, Score, all_placements
from tossup.supernet.search.run import run_search
from tossup.supernet.train import train

Scores = dict[Placement, Score]


def main() -> None:
    start = time.perf_counter()
    config = load_config(Path(__file__).with_name("demo.yaml"), sys.argv[1:], RunConfig)
    assert config.search is not None
    supernet = load_checkpoint(train(config))
    data = build_data(config.data, config.seed)
    batches = data.evaluation(config.search.batches, config.search.batch_size)

    placements = all_placements(config.model.num_layers, supernet.mixer_names)
    scores = dict(zip(placements, evaluate_placements(supernet, batches, placements), strict=True))
    write_placements(scores, config.output / "placements.json")

    result = run_search(config, config.search)
    winner = tuple(result["final_configuration"]["placement"])
    allowed = [p for p in placements if p.count("attention") == 1]  # a search fills its budget
    best = max(scores[p].metrics["accuracy"] for p in allowed)

    export = config.output / "export"
    save_checkpoint(supernet, export, "apriel_hybrid_ssm", winner)
    reloaded = load_checkpoint(export)
    tokens = batches[0][0]
    with torch.no_grad():
        same = torch.equal(reloaded(tokens), supernet(tokens, placement=winner))

    print_table(scores, winner)
    found = result["final_configuration"]["score"]
    print(f"\nSearch, one attention layer allowed: {' '.join(winner)}, accuracy {found:.3f}")
    print(f"Brute force over the {len(allowed)} placements with one: accuracy {best:.3f}")
    print(f"Export reloaded: accuracy {evaluate_model(reloaded, batches).metrics['accuracy']:.3f}")
    draw_report(scores, winner, config.output / "report.png")
    print(f"{config.output}/ holds search.json, placements.json, export/ and report.png")
    print(f"{time.perf_counter() - start:.0f} seconds")
    if abs(found - best) > 1e-3 or not same:
        sys.exit("The search disagrees with brute force, or the export with the supernet.")


def write_placements(scores: Scores, path: Path) -> None:
    """Every placement's metrics and their standard errors, best first."""
    ranked = sorted(scores, key=lambda placement: scores[placement].metrics["loss"])
    entries = [
        {
            "placement": placement,
            **scores[placement].metrics,
            "standard_errors": scores[placement].standard_errors,
        }
        for placement in ranked
    ]
    write_atomically(path, json.dumps(entries, indent=2) + "\n")


def print_table(scores: Scores, winner: Placement) -> None:
    print("\nlayer 0    layer 1    layer 2    layer 3    accuracy   loss")
    for placement, score in sorted(scores.items(), key=lambda item: item[0].count("attention")):
        names = "".join(f"{name:11}" for name in placement)
        mark = "  ← the search's choice" if placement == winner else ""
        print(f"{names}{score.metrics['accuracy']:.3f}      {score.metrics['loss']:.3f}{mark}")


def draw_report(scores: Scores, winner: Placement, path: Path) -> None:
    """Quality against the number of attention layers, and which mixer runs where."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, (quality, map_) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    ranked = sorted(scores, key=lambda placement: -scores[placement].metrics["accuracy"])
    for number, placement in enumerate(ranked):
        score, chosen = scores[placement], placement == winner
        quality.errorbar(
            placement.count("attention") + 0.05 * (number % 5 - 2),  # so that equals stay apart
            score.metrics["accuracy"],
            score.standard_errors["accuracy"],
            marker="*" if chosen else "o",
            markersize=16 if chosen else 6,
            color="tab:red" if chosen else "tab:blue",
            alpha=1.0 if chosen else 0.6,
            zorder=2 + chosen,
        )
    quality.set(
        xlabel="attention layers",
        ylabel="accuracy",
        xticks=range(len(winner) + 1),
        ylim=(0, 1.05),
        title="Every placement (star: the search's choice)",
    )

    colors = {"attention": "tab:orange", "mamba": "tab:green"}
    for row, placement in enumerate(ranked):
        for layer, mixer in enumerate(placement):
            map_.barh(row, 0.95, 0.9, left=layer, color=colors[mixer])
    map_.set(
        xlabel="layer",
        xlim=(-0.05, len(winner)),
        xticks=[layer + 0.475 for layer in range(len(winner))],
        xticklabels=range(len(winner)),
        yticks=range(len(ranked)),
        yticklabels=[f"{scores[p].metrics['accuracy']:.3f}" for p in ranked],
        title="Which mixer ran where, best first (red: the search's choice)",
    )
    map_.get_yticklabels()[ranked.index(winner)].set_color("tab:red")
    map_.invert_yaxis()
    handles = [Patch(color=color, label=mixer) for mixer, color in colors.items()]
    map_.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
