"""What `verify` found: a line per layer, the first that differs, and an error for it."""

from __future__ import annotations

import dataclasses
from typing import Any


class AttentionMismatchError(ValueError):
    """A layer does not compute what eager attention, or ``linear``'s definition, says."""


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One layer's output, or a gradient of it, beside its definition's in float64.

    That is eager attention under the same pattern, and for ``linear`` its own.

    Attributes:
        batch: Which batch it was.
        name: The attention module, as in ``model.named_modules()``.
        layer_idx: The layer's number, or None for modules without one.
        method: Its ``attn_implementation``.
        quantity: ``"output"``, or ``"query gradient"``, ``"key gradient"``, ``"value gradient"``.
        max_abs_error: The largest error of one element.
        relative_error: The largest error of one token (norm over its heads), as a share of the
            largest norm of a token.
        budget: The relative error allowed: twice that of eager attention in the same dtype, and a
            floor for rounding. None where the method is an approximation by design. For gradients
            of ``linear`` it grows with what cancels in them.
        ok: Whether the error is within the budget; approximations need only be finite.
        detail: What is different, where it is: the pairs seen in excess and those missed.
        from_softmax: Of ``linear``, which is held against its own definition: how far this is from
            softmax attention, as `relative_error`. None elsewhere.
        not_judged: What the batch asks for and the check leaves open, such as packed documents that
            a wrapper around the model does not tell it of; empty where there is nothing.
    """

    batch: str
    name: str
    layer_idx: int | None
    method: str
    quantity: str
    max_abs_error: float
    relative_error: float
    budget: float | None
    ok: bool
    detail: str = ""
    from_softmax: float | None = None
    not_judged: str = ""

    def __str__(self) -> str:
        if self.budget is None:
            verdict = "by design" if self.ok else "NOT FINITE"
            allowed = "approximation"
        else:
            verdict = "ok" if self.ok else "DIFFERS"
            allowed = f"budget {self.budget:.1e}"
        line = (
            f"{self.batch}: {self.name} ({self.method}) {self.quantity}: relative error "
            f"{self.relative_error:.1e}, {allowed}, largest {self.max_abs_error:.1e}: {verdict}"
        )
        if self.from_softmax is not None:
            line += f"; {self.from_softmax:.1e} from softmax by design"
        if self.not_judged:
            line += f"; not judged: {self.not_judged}"
        return f"{line}; {self.detail}" if self.detail else line


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """All checks in the order in which the layers ran, batch by batch.

    Attributes:
        checks: A line per layer, batch and quantity.
        notes: What was not covered, and why.
    """

    checks: tuple[LayerCheck, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every layer is within its budget."""
        return self.first_difference is None

    @property
    def first_difference(self) -> LayerCheck | None:
        """The first layer that differs from eager attention, or None."""
        return next((check for check in self.checks if not check.ok), None)

    def raise_if_different(self) -> None:
        """Raise `AttentionMismatchError`, a ``ValueError``, that names the first difference."""
        first = self.first_difference
        if first is not None:
            layers = {check.name for check in self.checks if not check.ok}
            raise AttentionMismatchError(
                f"attention differs from what it should compute under the same pattern in "
                f"{len(layers)} of {len({check.name for check in self.checks})} layers; first in "
                f"{first}. Train with attn_implementation='eager' or 'sdpa' until it is mended."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "ok": self.ok,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Every check on a line of its own."""
        return "\n".join(str(check) for check in self.checks)

    def __str__(self) -> str:
        """A line per batch and quantity, and one per layer that differs."""
        lines = []
        groups: dict[tuple[str, str, str, bool], list[LayerCheck]] = {}
        for check in self.checks:
            key = (check.batch, check.method, check.quantity, check.budget is None)
            groups.setdefault(key, []).append(check)
        for (batch, method, quantity, approximate), checks in groups.items():
            wrong = [check for check in checks if not check.ok]
            worst = max(checks, key=lambda check: check.relative_error)
            if approximate:
                verdict = f"approximates by design, relative error up to {worst.relative_error:.1e}"
            else:
                verdict = f"relative error up to {worst.relative_error:.1e}"
                if not wrong:
                    verdict += f" (budget {worst.budget:.1e})"
                    verdict += "" if worst.not_judged else ": equal"
            open_ = dict.fromkeys(check.not_judged for check in checks if check.not_judged)
            if open_:
                verdict += f"; not judged: {', '.join(open_)}"
            distances = [c.from_softmax for c in checks if c.from_softmax is not None]
            if distances:
                verdict += f"; up to {max(distances):.1e} from softmax, by design"
            lines.append(f"{batch}: {method}, {quantity}s of {len(checks)} layers: {verdict}")
            lines += [f"  {check}" for check in wrong]
        lines += [f"note: {note}" for note in self.notes]
        first = self.first_difference
        if first is None:
            last = "every layer computes what eager attention computes under the same pattern"
            if any(check.budget is None for check in self.checks):
                last += ", but where it approximates by design"
            elif any(check.from_softmax is not None for check in self.checks):
                last = "every layer computes what its definition says under the same pattern"
            if any(check.not_judged for check in self.checks):
                last += ", as far as it was judged"
        else:
            last = f"first difference: {first.name}"
        lines.append(last)
        return "\n".join(lines)
