"""What a teacher sees of the student's env, and whether the two fit each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from opd_gym.envs.wrappers import PrivilegedObservation
from opd_gym.observations import obs_rows


class Normalisation:
    """
    Observations as a ``VecNormalize`` gives them, with its statistics of this moment.

    :param vec_normalize: The ``VecNormalize``, or what was read of it from a file
    :param observation_space: Space of the raw observations
    :raises ValueError: Statistics and observations differ in their shape
    """

    def __init__(self, vec_normalize: Any, observation_space: spaces.Space):
        self.clip = float(vec_normalize.clip_obs)
        # Either both are of Dict observations or neither is; the key of a plain observation is None
        known: dict[Any, spaces.Space] = {None: observation_space}
        if isinstance(observation_space, spaces.Dict):
            known = dict(observation_space.spaces)
        statistics: dict[Any, Any] = (
            vec_normalize.obs_rms if isinstance(vec_normalize.obs_rms, dict) else {None: vec_normalize.obs_rms}
        )
        self.statistics: dict[Any, tuple[th.Tensor, th.Tensor]] = {}
        normalised = dict(known)
        for key, rms in statistics.items():
            mean, var = (np.array(getattr(rms, name), np.float64) for name in ("mean", "var"))
            if key is None and None not in known:
                raise ValueError(f"The teacher's VecNormalize is of {mean.shape}, the env gives {observation_space}.")
            if key not in known:
                continue  # the teacher's own space says whether it misses something
            if mean.shape != known[key].shape:
                raise ValueError(
                    f"The teacher's VecNormalize has statistics of the shape {mean.shape}, the observation is "
                    f"{known[key]}. Give those that belong to the teacher, or, if it was trained on raw observations, "
                    'teacher_kwargs={"vec_normalize": False}.'
                )
            std = np.sqrt(var + float(vec_normalize.epsilon))
            self.statistics[key] = th.as_tensor(mean), th.as_tensor(std)
            if is_image_space(known[key]):
                normalised[key] = spaces.Box(-self.clip, self.clip, mean.shape, np.float32)
        #: Space of the normalised observations, as the teacher's policy was given it
        self.space = normalised[None] if None in normalised else spaces.Dict(normalised)

    def __call__(self, obs: Any) -> Any:
        if isinstance(obs, dict):
            return {key: self._normalise(key, array) for key, array in obs.items()}
        return self._normalise(None, obs)

    def _normalise(self, key: str | None, array: th.Tensor) -> th.Tensor:
        if key not in self.statistics:
            return array
        mean, std = (x.to(array.device) for x in self.statistics[key])
        return ((array - mean) / std).clamp(-self.clip, self.clip).float()


def unchanged(obs: Any) -> Any:
    return obs


def _normalises(env: VecEnv) -> bool:
    vec_normalize = unwrap_vec_normalize(env)
    return vec_normalize is not None and vec_normalize.norm_obs


def _keeps_keys(env: VecEnv) -> bool:
    return all(env.env_is_wrapped(PrivilegedObservation))


def hides_raw_observations(env: VecEnv) -> bool:
    """
    :param env: A vectorised env
    :return: Whether its observations are other ones than a teacher was trained on, or not all of them
    """
    return _normalises(env) or _keeps_keys(env)


def warn_of_own_statistics(env: VecEnv) -> None:
    """
    :param env: A vectorised env; where Gymnasium's ``NormalizeObservation`` wraps its envs there is a warning
    """
    if not any(env.env_is_wrapped(NormalizeObservation)):
        return
    if env.has_attr("update_running_mean") and not any(env.get_attr("update_running_mean")):
        return
    warnings.warn(
        "Gymnasium's NormalizeObservation shows the teacher the student's numbers, by running statistics that are not "
        "those of its training and differ from env to env. Use Stable-Baselines3's VecNormalize around the vectorised "
        "env: a teacher sees what lies before it. With update_running_mean=False there is no warning.",
        stacklevel=2,
    )


def raw_observation_space(env: VecEnv) -> spaces.Space:
    """
    :param env: A vectorised env
    :return: Space of its observations before a ``VecNormalize`` has changed them, or a ``PrivilegedObservation`` has
        taken keys away
    """
    if _keeps_keys(env):
        return env.get_attr("full_observation_space", indices=0)[0]
    vec_normalize = unwrap_vec_normalize(env)
    return vec_normalize.venv.observation_space if vec_normalize and vec_normalize.norm_obs else env.observation_space


def raw_observations(env: VecEnv, indices: np.ndarray) -> Any:
    """
    :param env: A vectorised env that hides them
    :param indices: Numbers of the envs to ask
    :return: Present observations of these envs, in :func:`raw_observation_space`
    """
    if _keeps_keys(env):
        rows = env.env_method("full_observation", indices=[int(index) for index in indices])
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    vec_normalize = unwrap_vec_normalize(env)
    assert vec_normalize is not None
    return obs_rows(vec_normalize.get_original_obs(), indices)


def check_action_spaces(
    teacher: spaces.Space, student: spaces.Space, whose: str = "The teacher", other: str = "the student"
) -> None:
    """
    Refuse a teacher, or the model that a student starts from, whose tokens do not mean what the student's mean.

    :param teacher: Teacher's action space
    :param student: Student's action space
    :param whose: What errors call the first
    :param other: What errors call the second
    """
    remedy = "Both must act in the same space: train one of them again, or wrap the env as it was for the first."
    differ = f"{whose}'s action space is {teacher}, {other}'s {student}. {remedy}"
    if type(teacher) is not type(student):
        raise ValueError(differ)
    same = teacher == student
    if isinstance(teacher, spaces.MultiDiscrete) and isinstance(student, spaces.MultiDiscrete) and not same:
        if teacher.nvec.shape != student.nvec.shape:
            raise ValueError(
                f"{whose} acts with {teacher.nvec.size} tokens, {other} with {student.nvec.size}: chunk size "
                f"or number of action dimensions differ. {remedy}"
            )
        raise ValueError(
            f"{whose}'s tokens have {_summary(teacher.nvec)} bins, {other}'s {_summary(student.nvec)}. {remedy}"
        )
    if isinstance(teacher, spaces.Box) and isinstance(student, spaces.Box):
        # Bounds, not types: float32 and float64 boxes of one robot are the same actions
        same = teacher.shape == student.shape and bool(
            np.allclose(teacher.low, student.low) and np.allclose(teacher.high, student.high)
        )
    if not same:
        raise ValueError(differ)


def check_statistics(teacher: BasePolicy, env: VecEnv, student: BasePolicy) -> None:
    """
    Refuse a teacher whose action tokens are un-normalised by other statistics than the student's.

    :param teacher: Teacher's policy
    :param env: The student's env
    :param student: Student's policy
    """
    if not hasattr(teacher, "statistics"):
        return
    others = {}
    if hasattr(student, "statistics"):
        others["the student"] = student.statistics
    if env.has_attr("statistics"):
        others["the env (ActionTokens)"] = env.get_attr("statistics")[0]
    for name, statistics in others.items():
        if not _same_statistics(teacher.statistics, statistics):
            raise ValueError(
                f"The teacher's action tokens are un-normalised by other statistics than those of {name}, so one token "
                f"means two actions. Teacher: {teacher.statistics}; {name}: {statistics}. Build env and student with "
                "the teacher's statistics (ActionTokens(env, statistics=...))."
            )


def _same_statistics(a: Any, b: Any) -> bool:
    if not a or not b:
        return not a and not b
    mask = np.ones_like(a["q01"], dtype=bool)
    return a.get("gripper") == b.get("gripper") and all(
        np.shape(a.get(key, mask)) == np.shape(b.get(key, mask)) and np.allclose(a.get(key, mask), b.get(key, mask))
        for key in ("q01", "q99", "mask")
    )


def _summary(nvec: np.ndarray) -> str:
    return str(nvec.flat[0]) if len(set(nvec.flat)) == 1 else str(nvec.tolist())


def key_selector(
    keys: str | Sequence[str], space: spaces.Space, as_dict: bool
) -> tuple[Callable[[Any], Any], spaces.Space]:
    """
    What a teacher sees that was trained on some keys of a Dict observation.

    :param keys: The keys
    :param space: Space of the Dict observations
    :param as_dict: Whether the teacher sees a Dict; else the value of one key, or of several, flattened, in this order
    :return: Function from these observations to what it sees, and the space of that
    :raises ValueError: There are no such keys, or they cannot be joined
    """
    names = [keys] if isinstance(keys, str) else list(keys)
    if not isinstance(space, spaces.Dict) or not names or not set(names) <= set(space.spaces):
        raise ValueError(f"The teacher's obs_keys are {names}, the env's observation is {space}.")
    parts = {name: space.spaces[name] for name in names}
    if as_dict:
        return lambda obs: {name: obs[name] for name in names}, spaces.Dict(parts)
    if len(names) == 1:
        return lambda obs: obs[names[0]], parts[names[0]]
    boxes = [part for part in parts.values() if isinstance(part, spaces.Box)]
    if len(boxes) < len(names):
        raise ValueError(f"The teacher's obs_keys {names} cannot be joined: expected Box spaces, got {parts}.")
    low, high = (np.concatenate([getattr(box, bound).flatten() for box in boxes]) for bound in ("low", "high"))
    joined = spaces.Box(low, high, dtype=low.dtype.type)
    return lambda obs: th.cat([obs[name].flatten(1) for name in names], dim=1), joined


def observation_adapter(teacher: spaces.Space, env: spaces.Space) -> Callable[[Any], Any]:
    """
    How to turn the student's observations into the teacher's: only the keys that it knows, images in its own layout.

    :param teacher: Teacher's observation space
    :param env: Observation space of the student's env
    :return: Function from the student's to the teacher's observations
    """
    if isinstance(teacher, spaces.Dict):
        if not isinstance(env, spaces.Dict):
            raise ValueError(
                f"The teacher expects a Dict observation of {sorted(teacher.spaces)}, the env gives {env}."
            )
        missing = sorted(set(teacher.spaces) - set(env.spaces))
        if missing:
            raise ValueError(
                f"The teacher observes {sorted(teacher.spaces)}, of which the env does not give {missing} (it gives "
                f"{sorted(env.spaces)}). Use an env that does, or another teacher. To keep keys from the student "
                "alone, wrap each env in opd_gym.envs.wrappers.PrivilegedObservation."
            )
        adapters = {key: _array_adapter(space, env.spaces[key], f"`{key}`") for key, space in teacher.spaces.items()}
        return lambda obs: {key: adapt(obs[key]) for key, adapt in adapters.items()}
    return _array_adapter(teacher, env, "the observation")


def _array_adapter(teacher: spaces.Space, env: spaces.Space, name: str) -> Callable[[Any], Any]:
    if isinstance(env, spaces.Dict):
        raise ValueError(
            f"The teacher expects {name} as {teacher}, the student's env gives a Dict of {sorted(env.spaces)}. Say "
            'which of its keys the teacher sees: teacher_kwargs={"obs_keys": [...]}.'
        )
    # Bounds are not compared: they do not change what the numbers mean
    if type(teacher) is type(env) and teacher.shape == env.shape and teacher.dtype == env.dtype:
        if isinstance(teacher, spaces.Box) or teacher == env:
            return lambda array: array
    elif (
        isinstance(teacher, spaces.Box)
        and isinstance(env, spaces.Box)
        and is_image_space(teacher)
        and is_image_space(env)
    ):
        source, target = (1, -1) if is_image_space_channels_first(env) else (-1, 1)
        if np.moveaxis(np.empty((1, *env.shape)), source, target).shape[1:] == teacher.shape:
            return lambda array: array.movedim(source, target)
    raise ValueError(
        f"The teacher expects {name} as {teacher}, the student's env gives {env}. Build the env as the teacher's was "
        "(image size, frame stack, wrappers), or use another teacher."
    )
