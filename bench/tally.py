"""What a gate came to: how many cases there were, how many were compared, and what went wrong."""

from dataclasses import dataclass, field

from tossup.autotune.regression import Verdict


@dataclass
class Tally:
    """gate: which one, for what it prints. cases: all. compared: those with a figure of both sides.
    worse: of those that take more, or fail at the head. failed: of those that only the base fails.
    """

    gate: str
    cases: int = 0
    compared: int = 0
    worse: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.gate,
            self.cases + other.cases,
            self.compared + other.compared,
            self.worse + other.worse,
            self.failed + other.failed,
        )

    def judge(self, what: str, verdict: Verdict) -> None:
        """A case that was compared."""
        self.cases += 1
        self.compared += 1
        sentence = f"{what}: {verdict}"
        print(f"{self.gate}: {'SLOWER: ' if verdict.slower else ''}{sentence}", flush=True)
        self.worse += [sentence] if verdict.slower else []

    def skip(self, what: str, why: str, cases: int = 1) -> None:
        """What could not be compared, and need not be."""
        self.cases += cases
        print(f"{self.gate}: {what}: {why}: not compared", flush=True)

    def fail(self, what: str, why: str, side: str) -> None:
        """A case that could not be compared, because a side, base or head, fails it."""
        self.cases += 1
        sentence = f"{what}: {side}: {why}"
        print(f"{self.gate}: {sentence}", flush=True)
        (self.worse if side == "head" else self.failed).append(sentence)

    @property
    def passes(self) -> bool:
        """Whether something was compared, and all went well."""
        return self.compared > 0 and not self.worse and not self.failed

    def summary(self) -> str:
        failed = f", {len(self.failed)} failed at the base" if self.failed else ""
        about = f"{len(self.worse)} worse, {self.compared} of {self.cases} compared{failed}"
        nothing = [] if self.compared else ["nothing was compared"]
        return "".join([about, *(f"\n  {s}" for s in self.worse + self.failed + nothing)])
