"""LIBERO as Gymnasium environments. Importing this package does not import LIBERO."""

from opd_gym.envs.libero.env import LiberoEnv
from opd_gym.envs.libero.suites import CLASSIC_SUITES, PRO_SUITES, SUITES

__all__ = ["CLASSIC_SUITES", "PRO_SUITES", "SUITES", "LiberoEnv"]
