"""A vision-language-action network of your own, in plain PyTorch, as a student on LIBERO."""

import csv

import torch as th
import tyro
from stable_baselines3.common.logger import configure
from torch import nn

from opd_gym import OPD
from opd_gym.policies.body import VLABody, VLAConfig, VLAOutput, register_body


class YourNetwork(nn.Module):
    """Stands for yours: two pictures, text and the robot's state in; the bins of 8 actions of 7 numbers out."""

    def __init__(self, width: int):
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(6, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Flatten())
        self.read = nn.EmbeddingBag(256, 32)
        self.think = nn.Sequential(nn.Linear(64 * 6 * 6 + 32 + 9, width), nn.ReLU())
        self.act = nn.Linear(width, 8 * 7 * 256)

    def forward(self, pictures: th.Tensor, text: th.Tensor, state: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        hidden = self.think(th.cat([self.see(pictures), self.read(text), state], dim=1))
        return self.act(hidden), hidden


class YourConfig(VLAConfig):
    model_type = "your_vla"

    def __init__(self, hidden_size: int = 256, **kwargs):
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class YourBody(VLABody):
    """What lies between your network and opd_gym."""

    config_class = YourConfig

    def __init__(self, config: YourConfig):
        super().__init__(config)
        self.net = YourNetwork(config.hidden_size)
        self.post_init()

    def forward(self, images, instruction, proprio=None) -> VLAOutput:
        pictures = th.cat([images[key] for key in self.config.image_keys], dim=1)  # uint8, (B, 3, 64, 64) each
        logits, hidden = self.net(pictures / 255, instruction.int(), proprio)
        return VLAOutput(logits.view(-1, self.config.n_tokens, self.config.n_bins), hidden)


def main(weights: str | None = None, decisions: int = 1_024, n_steps: int = 64, seed: int = 0) -> None:
    register_body("your_vla", YourBody)
    kwargs = {"policy_kwargs": {"body": "your_vla"}, "n_steps": n_steps, "gradient_steps": "auto"}
    model = OPD("VLAPolicy", "LiberoObjectTask3-v0", **kwargs, seed=seed)
    if weights is not None:  # what you have trained
        model.policy.body.net.load_state_dict(th.load(weights, weights_only=True))
    model.set_logger(configure("own_vla", ["csv"]))
    model.learn(decisions)  # from the zoo's teacher of this env
    with open("own_vla/progress.csv") as file:
        for row in csv.DictReader(file):
            if row["train/agreement"]:
                kl, agreement = float(row["train/kl"]), 100 * float(row["train/agreement"])
                print(f"{row['train/n_updates']:>4} updates: KL {kl:.2f} a token, {agreement:.0f} % as the teacher's")
    model.policy.save_checkpoint("own_vla/student")  # policy_kwargs={"checkpoint": "own_vla/student"} reads it
    model.get_env().close()


if __name__ == "__main__":
    tyro.cli(main)
