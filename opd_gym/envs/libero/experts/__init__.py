"""Scripted, stateless experts for LIBERO: a pure function of the simulator's state, so any state can be labelled."""

from opd_gym.envs.libero.experts.expert import Expert, make_expert, supports

__all__ = ["Expert", "make_expert", "supports"]
