"""
What each command of ``opd-gym`` may be told: a class a command, whose fields and docstring are its options
and their help.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, UseCounterAction, arg, create_mutex_group

from opd_gym.checks import check_at_least, check_at_least_one, check_range
from opd_gym.files import check_writable

# As in opd_gym.zoo.hyperparams, which takes too long to import
Algorithm = Literal["opd", "grpo", "ppo", "sft"]
Dtype = Literal["bfloat16", "float32"]

# What numbers may be, by the name of the option
_POSITIVE = (
    "chunk_size",
    "episodes",
    "eval_freq",
    "episodes_per_task",
    "image_size",
    "n_envs",
    "n_timesteps",
    "replays",
)
_LEAST = {
    **dict.fromkeys((*_POSITIVE, "eval_freq", "scenes", "stride"), 1),
    **dict.fromkeys(("eval_episodes", "max_lost", "task_ids"), 0),
}
_INTERVALS = {
    "checkpoint_interval": "[0, inf)",
    "fps": "(0, inf)",
    "minutes": "(0, inf)",
    "perturbation": "[0, 1]",
    "reward_threshold": "[-inf, inf]",
}


def option(*aliases: str, metavar: str | None = None, name: str | None = None) -> Any:
    """
    :param aliases: other spellings
    :param metavar: what stands for the value in the help; None for its type
    :param name: the spelling, where it is not that of the field
    :return: annotation of a field; what is not given, or is no choice, has no default in the help
    """
    unsaid = ("None", "''", "", "True", "False")
    return arg(
        name=name,
        aliases=aliases,
        metavar=metavar,
        help_behavior_hint=lambda default: "" if default in unsaid else f"(default: {default})",
    )


Flag = Annotated[bool, option()]
Text = Annotated[str | None, option(metavar="STR")]
Number = Annotated[int | None, option(metavar="INT")]
Words = Annotated[tuple[str, ...] | None, option(metavar="STR [STR ...]")]
Numbers = Annotated[tuple[int, ...] | None, option(metavar="INT [INT ...]")]
Overrides = Annotated[list[str], option(metavar="KEY:VALUE [KEY:VALUE ...]")]
Assignments = Annotated[UseAppendAction[list[str]], option("-P", name="param", metavar="KEY=VALUE")]


@dataclass
class Options:
    """What all commands have in common."""

    # Whether output is a folder
    many_files: ClassVar[bool] = False

    def check_outputs(self) -> None:
        """
        Find out now, and not when all is done, whether the results can be written.

        :raises OSError: they cannot
        """
        for name in ("output", "markdown", "folder", "pictures", "keep"):
            path = getattr(self, name, None)
            # A run that goes on has its folder
            if path is not None and not (name == "folder" and getattr(self, "resume", None)):
                is_folder = self.many_files if name == "output" else name != "markdown"
                check_writable(path, is_folder)

    def __post_init__(self) -> None:
        for item in fields(self):
            name, value = f"--{item.name.replace('_', '-')}", getattr(self, item.name)
            if value == () and item.default != ():
                raise ValueError(f"{name} needs at least one value.")
            named = ("task_ids", "env", "categories", "difficulty", "demonstrations")
            if item.name in named and isinstance(value, (list, tuple)) and len(set(value)) < len(value):
                raise ValueError(f"{name} names something twice: {' '.join(map(str, value))}.")
            # A shell leaves the ~ of --output=~/x as it is
            if isinstance(value, Path) or item.name == "folder" and isinstance(value, str):
                object.__setattr__(self, item.name, type(value)(os.path.expanduser(value)))
            elif isinstance(value, tuple) and value and isinstance(value[0], Path):
                object.__setattr__(self, item.name, tuple(path.expanduser() for path in value))
            for one in value if isinstance(value, tuple) else (value,):
                if item.name in _LEAST:
                    check_at_least(_LEAST[item.name], **{name: one})
                elif item.name in _INTERVALS and one is not None:
                    check_range(_INTERVALS[item.name], **{name: one})


@dataclass
class TrainArgs(Options):
    """
    What a run is started with.

    :param algo: the algorithm
    :param env: environment id, for instance LiberoObject-v0
    :param n_timesteps: number of decisions; default: what the YAML file says
    :param seed: seed of everything
    :param hyperparams: override the YAML file, for instance learning_rate:5e-4 env_kwargs.image_size:64
    :param config: YAML file of hyperparameters instead of the zoo's
    :param teacher: directory of a VLA checkpoint, zip of a model, directory of a run, name of the zoo, or "expert";
        default: the zoo's teacher for this env
    :param student: likewise, to start from; "none" for random weights; default: the zoo's student for this env
    :param demonstrations: HDF5 files, folders of them, or data sets of LeRobot's, for sft; -P
        demonstration_kwargs.skip=true leaves out damaged ones and names them
    :param folder: where the directory of the run goes
    :param ray: address of a Ray cluster whose machines host the envs, or "auto" for the one this machine is part of
    :param eval_episodes: held-out episodes to play at the end
    :param eval_freq: play them every so many decisions as well, in envs of their own, and keep best_model.zip; default:
        only at the end
    :param device: "auto", "cpu", "cuda", ...
    :param trust: open teacher, student and run even where their files hold code, which then runs
    :param checkpoint_interval: seconds between two checkpoints, at least
    :param track: log to Weights & Biases as well, as its own variables say (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE)
    :param progress: a progress bar is shown unless --no-progress is given
    :param verbose: print the table of every iteration
    """

    algo: Algorithm = "opd"
    env: Annotated[str, option()] = ""
    n_timesteps: Annotated[int | None, option("-n", metavar="INT")] = None
    seed: int = 0
    hyperparams: Overrides = field(default_factory=list)
    config: Annotated[str | None, option(metavar="FILE")] = None
    teacher: Text = None
    student: Annotated[str | None, option("--checkpoint", metavar="STR")] = None
    demonstrations: Annotated[list[str], option(metavar="PATH [PATH ...]")] = field(default_factory=list)
    folder: Annotated[str, option("-f", metavar="DIR")] = "runs"
    ray: Annotated[str | None, option(metavar="ADDRESS")] = None
    eval_episodes: int = 0
    eval_freq: Number = None
    device: str = "auto"
    trust: Flag = False
    checkpoint_interval: Annotated[float, option(metavar="SECONDS")] = 60.0
    track: Flag = False
    progress: Flag = True
    verbose: Annotated[UseCounterAction[int], arg(aliases=["-v"])] = 0


@dataclass
class Train(TrainArgs):
    """
    Train a policy, or go on with a run.

    :param param: the same as --hyperparams, one at a time: -P learning_rate=5e-4 -P env_kwargs.image_size=64
    :param resume: go on with the run of this directory from its last checkpoint
    :param nproc: learners, each with its own GPU and envs, that make every update together
    """

    param: Assignments = field(default_factory=list)
    resume: Annotated[Path | None, option(metavar="DIR")] = None
    nproc: Annotated[int, option(metavar="N")] = 1


@dataclass(kw_only=True)
class Play(Options):
    """
    Episodes of a policy.

    :param checkpoint: directory of a VLA checkpoint, zip of a model, directory of a run, or a name of the zoo
    :param task_ids: tasks; default: all of the env
    :param categories: LIBERO-Plus' perturbations, for instance camera language
    :param difficulty: LIBERO-Plus' levels, 1 to 5; needs --difficulty-file
    :param difficulty_file: LIBERO-Plus' task_classification.json
    :param episodes: of each env, shared evenly by the tasks; fewer than LIBERO-Plus' tasks take a part of each
        category; default: 100, or all official initial states where there are fewer
    :param init_states: official or drawn states
    :param n_envs: parallel envs
    :param stochastic: sample actions instead of taking the most likely
    :param temperature: sample them at this temperature, as in training
    :param reward_threshold: return that counts as success where the env says nothing about it
    :param max_lost: episodes that may be lost with their worker; the exit status is 1 if there are more
    :param env_kwargs: for instance visuals:exact horizon:400
    :param param: the same one at a time, spelt as in training: -P env_kwargs.visuals=exact
    :param seed: seed of sampled actions; the episodes are held-out ones and stay the same
    :param device: "auto", "cpu", "cuda", ...
    :param dtype: of a VLA's weights and computations; default: float32, or as its zip says
    :param trust: open checkpoints even where they hold code, which then runs
    :param progress: a progress bar is shown unless --no-progress is given
    """

    checkpoint: Annotated[str, option("--student")]
    task_ids: Numbers = None
    categories: Words = None
    difficulty: Numbers = None
    difficulty_file: Annotated[str | None, option(metavar="FILE")] = None
    episodes: Number = None
    init_states: Literal["eval", "sampled"] = "eval"
    n_envs: int = 2
    stochastic: Flag = False
    temperature: Annotated[float | None, option(metavar="FLOAT")] = None
    reward_threshold: Annotated[float | None, option(metavar="FLOAT")] = None
    max_lost: int = 0
    env_kwargs: Overrides = field(default_factory=list)
    param: Assignments = field(default_factory=list)
    seed: int = 0
    device: str = "auto"
    dtype: Annotated[Dtype | None, option()] = None
    trust: Flag = False
    progress: Flag = True


@dataclass(kw_only=True)
class Eval(Play):
    """
    Success rate over held-out episodes.

    :param env: environment ids, for instance LiberoObject-v0; several give one table, by perturbation
    :param output: JSON file for the result of every episode
    """

    env: Annotated[tuple[str, ...], option(metavar="STR [STR ...]")]
    output: Annotated[Path | None, option("-o", metavar="FILE")] = None


@dataclass(kw_only=True)
class Enjoy(Play):
    """
    Film a policy.

    :param env: environment id, for instance LiberoObject-v0
    :param episodes: number of episodes
    :param output: .mp4 or .gif
    :param fps: pictures per second
    :param before: a second policy in the same episodes, on the left
    """

    env: str
    episodes: Number = 1
    n_envs: int = 1
    output: Annotated[Path, option("-o", metavar="FILE")] = Path("runs/video.mp4")
    fps: float = 5.0
    before: Annotated[str | None, option(metavar="CHECKPOINT")] = None


@dataclass(kw_only=True)
class Export(Options):
    """
    Write a VLA as a plain checkpoint: a directory of config.json and weights, LoRA adapters merged into them.

    :param env: environment id for which it was trained
    :param checkpoint: directory of a VLA checkpoint, zip of a model, directory of a run, or a name of the zoo
    :param output: directory to write
    :param dtype: type in which the weights are stored; default: their own
    :param trust: open a zip even where it holds code, which then runs
    """

    many_files: ClassVar[bool] = True

    env: str
    checkpoint: Annotated[str, option("--student")]
    output: Annotated[Path, option("-o", metavar="DIR")]
    dtype: Annotated[Literal["float32", "float16", "bfloat16"] | None, option()] = None
    trust: Flag = False


@dataclass(kw_only=True)
class HubPush(Options):
    """
    Publish a policy on the Hugging Face hub, with a card: a VLA as a plain checkpoint, others as the zip of the model.

    :param checkpoint: directory of a run or of a VLA checkpoint, zip of a model, or a name of the zoo
    :param repo: owner/name on the hub; created if needed
    :param evaluation: file of `opd-gym eval -o`, for the card and its metrics; default: evaluation.json of the run
    :param license: as the hub spells it, for instance mit
    :param dtype: type in which the weights of a VLA are stored; default: their own
    :param private: a new repository is private
    :param folder: write what would be uploaded there instead, without a network
    :param trust: open a zip even where it holds code, which then runs
    """

    checkpoint: Annotated[str, Positional, option()]
    repo: Annotated[str, Positional, option(metavar="OWNER/NAME")]
    evaluation: Annotated[Path | None, option(metavar="FILE")] = None
    license: Text = None
    dtype: Annotated[Literal["float32", "float16", "bfloat16"] | None, option()] = None
    private: Flag = False
    folder: Annotated[Path | None, option("-f", metavar="DIR")] = None
    trust: Flag = False


@dataclass(kw_only=True)
class HubPull(Options):
    """
    Fetch a policy from the Hugging Face hub into a folder, with its card and its evaluation.

    :param repo: owner/name on the hub
    :param output: folder; default: its name, in this folder
    :param revision: branch, tag or commit; default: the newest
    """

    many_files: ClassVar[bool] = True

    repo: Annotated[str, Positional, option(metavar="OWNER/NAME")]
    output: Annotated[Path | None, option("-o", metavar="DIR")] = None
    revision: Text = None


@dataclass(kw_only=True)
class Report(Options):
    """
    Compare runs on one page: curves, tables, films.

    :param results: directories of runs, files of `opd-gym eval -o`, or folders that hold some, and films
    :param output: the page, one HTML file
    :param title: its title
    :param label: what is found at a path is called NAME, for instance 'student/*=student'; in the table's order
    :param reference: name of what the others are compared with, for instance teacher
    :param tasks: success of these tasks alone as well, for instance seen=0-5
    :param before: what a policy had cost when its training began, for instance for its teacher: curves with that as
        well. NAME@ENV is the policy in one of several envs
    :param markdown: the tables as Markdown as well
    :param pictures: folder for PNGs of each env: success over env steps, entropy, KL, and what the options add
    :param keep: folder for copies of all that the page is made from, to be published: no weights
    """

    results: Annotated[tuple[Path, ...], Positional, option(metavar="PATH [PATH ...]")]
    output: Annotated[Path, option("-o", metavar="FILE")] = Path("report.html")
    title: str = "On-policy distillation"
    label: Annotated[UseAppendAction[list[str]], option("-l", metavar="PATTERN=NAME")] = field(default_factory=list)
    reference: Text = None
    tasks: Annotated[UseAppendAction[list[str]], option(metavar="NAME=TASKS")] = field(default_factory=list)
    before: Annotated[UseAppendAction[list[str]], option(metavar="NAME=ENV_STEPS,MINUTES")] = field(
        default_factory=list
    )
    markdown: Annotated[Path | None, option(metavar="FILE")] = None
    pictures: Annotated[Path | None, option(metavar="DIR")] = None
    keep: Annotated[Path | None, option(metavar="DIR")] = None


@dataclass(kw_only=True)
class Demos(Options):
    """
    Record demonstrations by the scripted expert, or by a policy. Run again, it goes on with the tasks that have no file
    yet; it replaces none.

    :param env: LIBERO environment id, for instance LiberoObject-v0
    :param task_ids: tasks; default: all of the env
    :param episodes_per_task: successful episodes of each
    :param seed: seed of the first episode
    :param checkpoint: policy that plays, with its most likely actions: name of the zoo, directory or zip; default: the
        scripted expert
    :param image_size: side of the pictures; default: what the policy was trained with, or 128
    :param visuals: how they are drawn; default: as for image_size, or light
    :param chunk_size: length of the labels; default: what the policy decides at once, or 8
    :param stride: record every so many steps
    :param perturbation: probability of a push at a step
    :param format: LIBERO's HDF5, one file a task; or one data set of LeRobot's (extra lerobot)
    :param videos: LeRobot's format with videos in place of pictures
    :param device: where a policy computes: "auto", "cpu", "cuda", ...
    :param trust: open a checkpoint even where it holds code, which then runs
    :param output: folder of the files, or of the data set
    :param progress: a progress bar is shown unless --no-progress is given
    """

    many_files: ClassVar[bool] = True

    env: str
    task_ids: Numbers = None
    episodes_per_task: Annotated[int, option("-n")] = 1
    seed: int = 0
    checkpoint: str | None = None
    image_size: int | None = None
    visuals: Literal["exact", "light"] | None = None
    chunk_size: int | None = None
    stride: int = 1
    perturbation: float = 0.0
    format: Literal["hdf5", "lerobot"] = "hdf5"
    videos: Flag = False
    device: str = "auto"
    trust: Flag = False
    output: Annotated[Path, option("-o", metavar="DIR")] = Path("runs/demos")
    progress: Flag = True


@dataclass
class List(Options):
    """
    Environments and checkpoints: what there is to run.

    :param all: every environment id, single tasks included
    """

    all: Flag = False


@dataclass(frozen=True)
class Run:
    """
    What is to be planned: counts are by default those of the zoo's run on LIBERO.

    :param student: openvla-7b, openvla-oft-7b, openvla-oft-7b-two-arms, qwen2.5-vl-3b, smolvlm-256m; the directory of
        a checkpoint; its config.json; a name of the zoo
    :param teacher: likewise; "student" for the same model, "none" for none, or a scripted expert
    :param lora_rank: rank of the student's adapters
    :param dtype: of the student's frozen weights and computations
    :param teacher_dtype: likewise of the teacher
    :param teacher_elsewhere: the teacher has a device of its own
    :param gradient_checkpointing: layers are computed a second time in the backward pass, unless
        --no-gradient-checkpointing is given
    :param micro_batch_size: observations that go through the student at once, in training
    :param batch_size: observations of a gradient step
    :param gradient_steps: gradient steps of an iteration
    :param n_envs: number of workers
    :param n_steps: decisions of each worker in an iteration
    :param iterations: number of iterations
    :param nproc: learners, each with its own GPU; envs, steps and batches are those of one
    :param shard: all trained weights are spread over their GPUs (with --full)
    :param shard_teacher: the teacher's are
    """

    student: str
    teacher: str | None = "student"
    lora_rank: int | None = 32
    dtype: Dtype = "bfloat16"
    teacher_dtype: Dtype = "bfloat16"
    teacher_elsewhere: Flag = False
    gradient_checkpointing: Flag = True
    micro_batch_size: int = 4
    batch_size: int = 128
    gradient_steps: int = 40
    n_envs: int = 2
    n_steps: int = 64
    iterations: int = 32
    nproc: int = 1
    shard: Flag = False
    shard_teacher: Flag = False

    def __post_init__(self) -> None:
        names = ("micro_batch_size", "batch_size", "gradient_steps", "n_envs", "n_steps", "iterations", "lora_rank")
        check_at_least_one(**{name: getattr(self, name) for name in (*names, "nproc")})
        if self.shard and self.lora_rank is not None and not getattr(self, "full", False):
            raise ValueError("LoRA leaves nothing to shard: plan with --full --shard, or without --shard.")
        if self.shard_teacher and (self.teacher_elsewhere or self.teacher in (None, "none")):
            raise ValueError("A sharded teacher lies on the GPUs of all learners, and there has to be one.")


@dataclass(frozen=True)
class Plan(Run):
    """
    Memory and time of a run of OPD: memory by what it is for, which GPUs have it, what to change, how long it takes.

    :param full: train all weights instead of LoRA adapters
    :param batch_size: observations of a gradient step; default: 128, shared by all learners
    :param n_steps: decisions of each worker in an iteration; default: 64, shared by all learners
    """

    full: Flag = False
    # As opd-gym train does with the zoo's
    batch_size: Number = None  # type: ignore[assignment]
    n_steps: Number = None  # type: ignore[assignment]


@dataclass
class Quickstart(Options):
    """
    OPD on real LIBERO in minutes: the student before and after.

    :param env: LIBERO environment id
    :param minutes: time for everything
    :param task_ids: tasks; default: what the hyperparameters name, or all
    :param n_envs: parallel simulators; default: what the hyperparameters name
    :param eval_episodes: held-out episodes, before and after each
    :param student: checkpoint to start from; default: the zoo's
    :param teacher: its teacher; default: the zoo's
    :param hyperparams: see opd-gym train
    :param param: likewise, one at a time
    :param seed: seed of everything
    :param device: "auto", "cpu", "cuda", ...
    :param trust: open student and teacher even where they hold code, which then runs
    :param folder: where the results go
    """

    env: str = "LiberoObject-v0"
    minutes: float = 13.5
    task_ids: Numbers = None
    n_envs: Number = None
    eval_episodes: int = 20
    student: Text = None
    teacher: Text = None
    hyperparams: Overrides = field(default_factory=list)
    param: Assignments = field(default_factory=list)
    seed: int = 0
    device: str = "auto"
    trust: Flag = False
    folder: Annotated[Path, option("-f", metavar="DIR")] = Path("runs/quickstart")


@dataclass
class Doctor(Options):
    """
    What is installed, what is wrong, the command that mends it, and whether LIBERO is as published.

    :param self_check: scenes of LIBERO are played as well, unless --no-self-check is given
    :param json: the same as JSON, for a bug report
    """

    self_check: Flag = True
    json: Flag = False


@dataclass
class RobotwinInstall(Options):
    """
    RoboTwin's runtime without its pins, and a software Vulkan driver.

    :param force: anew, whatever is there already
    :param planner: also that of RoboTwin's expert, to record traces with
    """

    force: Flag = False
    planner: Flag = False


_KIND = create_mutex_group(required=True)


@dataclass
class RobotwinAssets(Options):
    """
    RoboTwin's assets, or a stand-in robot.

    :param download: the real ones, from the Hugging Face hub
    :param stand_in: a robot of boxes, and some objects, without a download
    :param output: folder; default: where the environments look for it
    """

    many_files: ClassVar[bool] = True

    download: Annotated[bool, _KIND, option()] = False
    stand_in: Annotated[bool, _KIND, option()] = False
    output: Annotated[Path | None, option("-o", metavar="DIR")] = None


@dataclass
class RobotwinCheck(Options):
    """
    Play the expert's traces with the stand-in robot, and film it.

    :param env: environment id of one of the tasks; default: all that there are traces of
    :param output: folder of the films
    """

    many_files: ClassVar[bool] = True

    env: Text = None
    output: Annotated[Path, option("-o", metavar="DIR")] = Path("runs/robotwin")


@dataclass(kw_only=True)
class RobotwinExpert(Options):
    """
    RoboTwin's own expert.

    :param env: environment id, for instance RoboTwinHandoverBlock-v0
    :param python: interpreter that has the planner; default: that of `install --planner`
    :param task_config: RoboTwin's name of the domain
    :param n_envs: simulators at once; what comes out is the same
    """

    env: str
    python: Text = None
    task_config: Literal["demo_clean", "demo_randomized"] = "demo_clean"
    n_envs: int = 2


@dataclass(kw_only=True)
class RobotwinRecord(RobotwinExpert):
    """
    Traces of RoboTwin's own expert.

    :param episodes: successful episodes
    :param seed: first scene; the following ones count up
    :param output: folder, one file a trace
    """

    many_files: ClassVar[bool] = True

    episodes: Annotated[int, option("-n")] = 1
    seed: int = 0
    output: Annotated[Path, option("-o", metavar="DIR")] = Path("runs/traces")


@dataclass(kw_only=True)
class RobotwinSeeds(RobotwinExpert):
    """
    The evaluation scenes that RoboTwin's own expert solves.

    :param scenes: number of scenes
    :param output: file, for eval_seeds
    """

    scenes: Annotated[int, option("-n")] = 100
    output: Annotated[Path, option("-o", metavar="FILE")] = Path("runs/seeds.json")


@dataclass(kw_only=True)
class RobotwinDemos(Options):
    """
    Demonstrations (HDF5) out of traces.

    :param traces: files, or folders of them
    :param replays: demonstrations of each trace
    :param perturbation: probability that a chunk is pushed off its way
    :param chunk_size: length of the labels
    :param image_size: height and width; default: RoboTwin's own
    :param cameras: pictures to record
    :param shader: how they are drawn
    :param seed: seed of the pushes
    :param n_envs: simulators at once; the demonstrations are the same
    :param output: folder, one file a task
    :param progress: a progress bar is shown unless --no-progress is given
    """

    many_files: ClassVar[bool] = True

    traces: Annotated[tuple[Path, ...], option(metavar="PATH [PATH ...]")]
    replays: Annotated[int, option("-n")] = 1
    perturbation: float = 0.0
    chunk_size: int = 25
    image_size: Numbers = None
    cameras: Annotated[tuple[str, ...], option(metavar="STR [STR ...]")] = ("head",)
    shader: Literal["default", "rt"] = "default"
    seed: int = 0
    n_envs: int = 2
    output: Annotated[Path, option("-o", metavar="DIR")] = Path("runs/demos")
    progress: Flag = True
