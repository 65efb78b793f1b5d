"""
TRL's generalised Jensen-Shannon loss (GKD) on fixed logits, with its gradient: what the divergences here are held to.

In an environment with TRL, which the tests do not need::

    pip install trl && python tests/golden/trl/make_golden.py

TRL's ``beta`` at its ends: 0 is the forward KL, KL(teacher, student); 1 is the reverse KL, KL(student, teacher).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import trl
from trl.experimental.gkd import GKDTrainer

IGNORED = -100
# By their names here
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def rounded(tensor: torch.Tensor) -> list:
    return [[[round(value, 12) for value in row] for row in rows] for rows in tensor.tolist()]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that the file says exactly what was computed on
    student, teacher = (
        (2.0 * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)).round(decimals=3) for _ in range(2)
    )
    labels = torch.tensor([[1, 4, IGNORED], [0, IGNORED, 2]])
    cases = []
    for temperature in (1.0, 1.6):
        for name, beta in BETAS.items():
            logits = student.clone().requires_grad_()
            loss = GKDTrainer.generalized_jsd_loss(logits, teacher, labels, beta=beta, temperature=temperature)
            loss.backward()
            cases.append(
                {
                    "divergence": name,
                    "beta": beta,
                    "temperature": temperature,
                    "loss": loss.item(),
                    "gradient": rounded(logits.grad),
                }
            )
    golden = {
        "trl": trl.__version__,
        "torch": torch.__version__.split("+")[0],
        "student_logits": rounded(student),
        "teacher_logits": rounded(teacher),
        "mask": (labels != IGNORED).int().tolist(),
        "cases": cases,
    }
    path = Path(__file__).with_name("generalized_jsd_loss.json")
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
