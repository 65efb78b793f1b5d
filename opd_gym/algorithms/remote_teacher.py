"""A teacher on another machine, which may teach several students at once, by Ray: ``pip install 'opd-gym[ray]'``."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecEnv

from opd_gym.algorithms.teacher_inputs import hides_raw_observations, raw_observation_space
from opd_gym.algorithms.teachers import LabelSmoothing, PolicyTeacher, make_teacher
from opd_gym.checks import check_at_least_one, check_range
from opd_gym.envs.make import env_id_of
from opd_gym.envs.workers.cluster import connect, kill, options_of, wait_for
from opd_gym.envs.workers.process import WorkerTraceback
from opd_gym.observations import join_obs, map_obs
from opd_gym.tokens import TokenView, is_autoregressive, token_spec

# So many deaths in a row without an answer in between are an error
MAX_DEATHS = 3
# Students of all runs on a cluster find the same actor here
_NAMESPACE = "opd_gym"
# What is sent of a view: its class, and its arrays
_Packed = tuple[type, dict[str, Any]]


@dataclass
class _Env:
    """What a teacher asks of the student's env, where that is not."""

    observation_space: spaces.Space
    action_space: spaces.Space
    attributes: dict[str, Any]

    def has_attr(self, name: str) -> bool:
        return name in self.attributes

    def get_attr(self, name: str, indices: Any = None) -> list[Any]:
        return [self.attributes[name]]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False]


@dataclass
class _Facts:
    """What a student asks of a teacher that is elsewhere."""

    masked: bool
    sees: str | None
    autoregressive: bool


@dataclass
class _Request:
    learner: str
    observations: Any
    actions: np.ndarray | None
    masks: np.ndarray | None
    answer: asyncio.Future[_Packed]

    def fits(self, other: _Request) -> bool:
        return (self.actions is None) == (other.actions is None) and (self.masks is None) == (other.masks is None)


class TeacherActor:
    """
    A teacher, and the students' requests to it. While it thinks about some, others gather; one of each student goes
    into the next batch. So a student that is alone is answered in exactly the batches that it asks in.

    :param max_batch_size: Rows of several students that go through the teacher at once
    :param device: Device of the teacher, unless its ``teacher_kwargs`` name one
    """

    def __init__(self, max_batch_size: int, device: str = "cpu") -> None:
        self._max_batch_size = max_batch_size
        self._device = device
        self._teacher: PolicyTeacher | None = None
        # One at a time: a policy is not made for two threads
        self._thread = ThreadPoolExecutor(1)
        # Set once there is a teacher, or something that speaks against it
        self._is_built = asyncio.Event()
        self._refusal: Exception | None = None
        self._requests: list[_Request] = []
        self._served: asyncio.Task[None] | None = None
        self._n_requests = self._n_batches = 0

    async def build(self, payload: bytes) -> _Facts:
        """
        :param payload: Pickled arguments of ``make_teacher``
        :return: What students need to know
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._build, payload)
        except Exception as error:
            self._refusal = error
            raise
        finally:
            self._is_built.set()

    def _build(self, payload: bytes) -> _Facts:
        if self._teacher is None:
            (arguments, kwargs), _ = cloudpickle.loads(payload)
            kwargs["device"] = kwargs.get("device") or self._device
            teacher = make_teacher(*arguments, **kwargs)
            assert isinstance(teacher, PolicyTeacher)
            self._teacher = teacher
        teacher = self._teacher
        return _Facts(teacher.privileged, teacher.sees, is_autoregressive(teacher.policy))

    async def opinion(
        self, learner: str, observations: Any, actions: np.ndarray | None, masks: np.ndarray | None
    ) -> _Packed:
        """
        :param learner: Name of the student
        :param observations: Raw observations
        :param actions: The student's actions there
        :param masks: Action masks
        :return: The teacher's distribution
        """
        await self._is_built.wait()
        if self._teacher is None:
            assert self._refusal is not None
            raise self._refusal
        request = _Request(learner, observations, actions, masks, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        self._n_requests += 1
        if self._served is None or self._served.done():
            self._served = asyncio.create_task(self._serve())
        return await request.answer

    async def counts(self) -> tuple[int, int]:
        """
        :return: Numbers of requests, and of batches that the teacher was asked
        """
        return self._n_requests, self._n_batches

    async def _serve(self) -> None:
        while self._requests:
            batch = self._next_batch()
            if not await self._answer(batch) and len(batch) > 1:
                # What one student asked is no error of another
                for request in batch:
                    await self._answer([request])

    async def _answer(self, batch: list[_Request]) -> bool:
        """Whether the teacher had an answer; if not, a single request is told why."""
        self._n_batches += 1
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._opinions, batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
            return False
        for request, answer in zip(batch, answers, strict=True):
            request.answer.set_result(answer)
        return True

    def _next_batch(self) -> list[_Request]:
        first = self._requests[0]
        batch: list[_Request] = []
        asked, n_rows = set(), 0
        for request in list(self._requests):
            rows = _n_rows(request.observations)
            if request.learner in asked or not request.fits(first):
                continue
            asked.add(request.learner)
            if batch and n_rows + rows > self._max_batch_size:
                continue
            batch.append(request)
            n_rows += rows
            self._requests.remove(request)
        return batch

    def _opinions(self, batch: list[_Request]) -> list[_Packed]:
        assert self._teacher is not None
        observations = join_obs([request.observations for request in batch])
        first = batch[0]
        actions = None if first.actions is None else np.concatenate([request.actions for request in batch])
        masks = None if first.masks is None else np.concatenate([request.masks for request in batch])
        view = self._teacher.opinion(
            map_obs(th.as_tensor, observations),
            None if actions is None else th.as_tensor(actions),
            masks,
        )
        kind, arrays = _pack(view)
        ends = np.cumsum([_n_rows(request.observations) for request in batch])
        return [
            (kind, {k: x[start:end] if isinstance(x, np.ndarray) else x for k, x in arrays.items()})
            for start, end in zip([0, *ends], ends, strict=False)
        ]


def _n_rows(observations: Any) -> int:
    return len(next(iter(observations.values())) if isinstance(observations, dict) else observations)


def _pack(view: TokenView) -> _Packed:
    def plain(value: Any) -> Any:
        if not isinstance(value, th.Tensor):
            return value
        # NumPy has no bfloat16
        return (value.float() if value.dtype == th.bfloat16 else value).cpu().numpy()

    return type(view), {field.name: plain(getattr(view, field.name)) for field in fields(view)}


def _unpack(packed: _Packed) -> TokenView:
    kind, arrays = packed
    # What comes out of Ray's store cannot be written to
    return kind(**{k: th.as_tensor(np.array(x)) if isinstance(x, np.ndarray) else x for k, x in arrays.items()})


class _Service:
    """
    The actor, as a student sees it: found or started by its name, and again where it dies.

    :param ray: Module of Ray
    :param payload: See :meth:`TeacherActor.build`
    :param options: Options of the actor
    :param timeout: Seconds without an answer after which it counts as dead
    :param max_batch_size: See :class:`RemoteTeacher`
    """

    def __init__(self, ray: Any, payload: bytes, options: dict[str, Any], timeout: float, max_batch_size: int):
        self._ray = ray
        self._payload = payload
        self._options = options
        self._timeout = timeout
        self._max_batch_size = max_batch_size
        what = repr((hashlib.sha256(payload).hexdigest(), sorted(options.items(), key=str), max_batch_size))
        self.name = f"teacher-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
        self.learner = uuid.uuid4().hex
        # Deaths that were noticed, all and since the last answer
        self.n_deaths = self._in_a_row = 0
        self.actor: Any = None
        self.facts: _Facts = self.submit(lambda actor: actor.build.remote(payload))()

    def _start(self) -> None:
        kind = self._ray.remote(TeacherActor)
        options = {"name": self.name, "namespace": _NAMESPACE, "get_if_exists": True, "max_concurrency": 1000}
        # Ray hides no GPU from an actor that did not ask for one
        device = "cuda" if self._options.get("num_gpus") else "cpu"
        self.actor = kind.options(**self._options, **options).remote(self._max_batch_size, device)
        # Behind this, all that this student asks is answered by a teacher that is there
        self.actor.build.remote(self._payload)

    def submit(self, send: Callable[[Any], Any]) -> Callable[[], Any]:
        """
        :param send: Sends a request to an actor
        :return: Waits for its answer, and sends it again where the actor dies
        """
        if not self._ray.is_initialized():
            raise RuntimeError("The teacher is in a Ray cluster, and Ray was shut down: set_env() finds it again.")
        if self.actor is None:
            self._start()
        sent_to, reference = self.actor, send(self.actor)

        def wait() -> Any:
            nonlocal sent_to, reference
            while True:
                try:
                    answer = wait_for(self._ray, reference, self._timeout)
                    self._in_a_row = 0
                    return answer
                except self._ray.exceptions.RayTaskError as error:
                    # What the teacher raised, and not what became of it
                    raise error.cause from WorkerTraceback(str(error))
                except TimeoutError:
                    kill(self._ray, sent_to)
                    reason = (
                        f"no answer for {self._timeout:g} s: killed. It asks for {self._options}; in the cluster are "
                        f"free {self._ray.available_resources()}"
                    )
                except self._ray.exceptions.RayError as error:
                    reason = str(error)
                if sent_to is self.actor:
                    self._died(reason)
                sent_to, reference = self.actor, send(self.actor)

        return wait

    def _died(self, reason: str) -> None:
        self.n_deaths += 1
        self._in_a_row += 1
        dead, self.actor = self.actor, None
        text = f"The teacher's actor {self.name} died: {reason}"
        if self._in_a_row >= MAX_DEATHS:
            raise RuntimeError(
                f"{text}\nIt died {self._in_a_row} times in a row without an answer. Its output is in Ray's logs on "
                "its machine. Most often that has no memory left: make micro_batch_size smaller, or "
                "teacher_kwargs={'ray': {'max_batch_size': ...}} where it teaches several students."
            )
        self._wait_for_name(dead)
        self._start()
        warnings.warn(f"{text}\nIt was started again (death {self.n_deaths}).", RuntimeWarning, stacklevel=2)

    def _wait_for_name(self, dead: Any) -> None:
        """Ray takes a moment until it gives the name of a dead actor away."""
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline:
            try:
                found = self._ray.get_actor(self.name, namespace=_NAMESPACE)
            except ValueError:
                return
            if found._actor_id != dead._actor_id:
                return
            time.sleep(0.1)


class RemoteTeacher(PolicyTeacher):
    """
    A :class:`~opd_gym.algorithms.teachers.PolicyTeacher` in a Ray actor, on any machine of a cluster:
    ``OPD(..., teacher=PATH, teacher_kwargs={"ray": "auto"})``.

    It is read from files where it is, and answers what it would answer here: a student that is alone is answered in
    the batches that it asks in. Students of any runs on the cluster that ask for the same teacher (name, files,
    ``teacher_kwargs``, spaces) share one actor, which takes a request of each of them into one batch. It ends with the
    run that started it; if others still learn of it, they start it again.

    A student sends its next requests while the teacher thinks about the first ones. An actor that dies, is lost with
    its machine or hangs is started again wherever there is room, and asked again what it did not answer, so the student
    learns the same. ``MAX_DEATHS`` deaths in a row without an answer are an error.

    :param spec: Path, name of the zoo or id on the hub, of a teacher of ``make_teacher``; a path is one on the machine
        of the actor. None: the teacher that the zoo has for this env
    :param env: The student's env
    :param student: The student's policy
    :param ray: Address of the Ray cluster, as in :func:`opd_gym.envs.workers.cluster.connect`, or a mapping with
        ``address``; ``actor_options`` (``num_gpus``, 0; ``num_cpus``, 0, so that it has room beside envs;
        ``resources``, ``runtime_env``, ...); ``timeout``, the seconds without an answer after which it counts as dead
        (1800; in them it is read from its files as well); ``max_batch_size``, how many rows of several students go
        through the teacher at once (256)
    :param kwargs: Other ``teacher_kwargs``; ``device`` is the actor's, None: a GPU if ``num_gpus`` asks for one
    :raises ImportError: Ray is not installed
    :raises ConnectionError: There is no cluster
    :raises ValueError: What ``make_teacher`` raises, as all that it raises; or a teacher that is not read from files
    """

    asked_ahead = 4

    def __init__(
        self,
        spec: str | os.PathLike[str] | None,
        env: VecEnv,
        student: BasePolicy,
        ray: str | Mapping[str, Any],
        **kwargs: Any,
    ):
        if spec == "expert" or not (spec is None or isinstance(spec, (str, os.PathLike))):
            raise ValueError(
                f"A teacher on another machine is read from files there, got {spec!r:.80}. Save it and give the path."
            )
        self._service = _service(ray, _payload(spec, env, student, kwargs))
        facts = self._service.facts
        self.sees_raw = hides_raw_observations(env)
        self._masked = facts.masked
        self.privileged = self.sees_raw or self._masked
        if self.sees_raw and facts.autoregressive:
            raise ValueError(
                "An autoregressive teacher cannot label the states of a VecNormalize or a PrivilegedObservation: use "
                "the env without."
            )
        self.sees = facts.sees or ("raw observations" if self.sees_raw else None)
        self.policy = None  # type: ignore[assignment]  # it is elsewhere
        self.action_space = env.action_space
        self.spec = token_spec(env.action_space, squashed=student.squash_output)
        self._smooth = LabelSmoothing(self.spec, env.action_space, False)
        if self.sees_raw:
            self.label_size = self.spec.flat_size
        elif self._masked:
            self.label_size = self._n_masks

    @property
    def n_deaths(self) -> int:
        """Deaths of its actor that this student noticed."""
        return self._service.n_deaths

    def opinion(self, observations: PyTorchObs, actions: th.Tensor | None, masks: np.ndarray | None) -> TokenView:
        return self._send(observations, actions, masks)()

    def ask(
        self, observations: PyTorchObs, labels: th.Tensor, actions: th.Tensor | None = None
    ) -> Callable[[], TokenView]:
        if self.sees_raw:
            return super().ask(observations, labels, actions)
        masks = labels.cpu().numpy() > 0 if self._masked else None
        answer = self._send(observations, actions, masks)
        return lambda: answer().to(labels.device)

    def _send(
        self, observations: PyTorchObs, actions: th.Tensor | None, masks: np.ndarray | None
    ) -> Callable[[], TokenView]:
        arrays = map_obs(lambda array: array.cpu().numpy(), observations)
        rows = None if actions is None else actions.cpu().numpy()
        learner = self._service.learner
        answer = self._service.submit(lambda actor: actor.opinion.remote(learner, arrays, rows, masks))
        return lambda: _unpack(answer())


def _service(ray: str | Mapping[str, Any], payload: bytes) -> _Service:
    given: dict[str, Any] = {"address": ray} if isinstance(ray, str) else dict(ray)
    known = ("address", "actor_options", "timeout", "max_batch_size")
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"Unknown keys {unknown} of teacher_kwargs['ray']: expected an address, or some of {known}.")
    timeout, max_batch_size = given.get("timeout", 1800.0), given.get("max_batch_size", 256)
    check_range("(0, inf)", timeout=timeout)
    check_at_least_one(max_batch_size=max_batch_size)
    # Envs may have taken every CPU
    options = options_of(given.get("actor_options"), {"num_cpus": 0})
    return _Service(connect(given.get("address")), payload, options, timeout, max_batch_size)


def _payload(spec: str | os.PathLike[str] | None, env: VecEnv, student: BasePolicy, kwargs: dict[str, Any]) -> bytes:
    """Arguments of ``make_teacher``, the same bytes for students that may share a teacher."""
    env_id = env_id_of(env)
    attributes: dict[str, Any] = {"spec": None if env_id is None else SimpleNamespace(id=env_id)}
    if env.has_attr("statistics"):
        attributes["statistics"] = env.get_attr("statistics")[0]
    if env.has_attr("action_masks"):
        attributes["action_masks"] = True
    there = _Env(_without_generators(raw_observation_space(env)), _without_generators(env.action_space), attributes)
    named = {"statistics": student.statistics} if hasattr(student, "statistics") else {}  # type: ignore[attr-defined]
    pupil = SimpleNamespace(squash_output=student.squash_output, **named)
    path = None if spec is None else os.fspath(spec)
    # Other weights under the same name are another teacher
    return cloudpickle.dumps((((path, there, pupil), kwargs), _stamp(path)))


def _without_generators(space: spaces.Space) -> spaces.Space:
    """A copy of a space that knows nothing of its seed, which is the student's own."""
    space = copy.deepcopy(space)
    parts: list[spaces.Space] = list(space.spaces.values()) if isinstance(space, spaces.Dict) else []
    for part in [space, *parts]:
        part._np_random = None  # type: ignore[assignment]
    return space


def _stamp(path: str | None) -> list[tuple[str, int, int]]:
    """Sizes and dates of files, as far as they are on this machine."""
    here = Path(path or "").expanduser()
    files = sorted(here.iterdir()) if path and here.is_dir() else [here]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
