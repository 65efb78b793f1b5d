"""``opd-gym list``: environments and checkpoints."""

from __future__ import annotations

from opd_gym.checkpoints import read_registry
from opd_gym.cli.options import List
from opd_gym.envs.registration import LIBERO_IDS, ROBOTWIN_IDS


def run(args: List) -> int:
    """
    :param args: how much to list
    :return: exit status
    """
    shown = [env_id for env_id, kwargs in LIBERO_IDS.items() if args.all or "task_ids" not in kwargs]
    print("Environments:")
    for env_id in shown:
        print(f"  {env_id}")
    if len(shown) < len(LIBERO_IDS):
        print(f"  and {len(LIBERO_IDS) - len(shown)} of single tasks, such as LiberoObjectTask0-v0 (--all shows them)")
    robotwin = list(ROBOTWIN_IDS)
    for env_id in robotwin if args.all else robotwin[:1]:
        print(f"  {env_id}")
    if not args.all:
        print(f"  and {len(robotwin) - 1} of RoboTwin's other tasks (--all shows them)")
    print("  and every id of Gymnasium that has a policy for its spaces")
    print("Checkpoints:")
    for entry in read_registry().values():
        roles = [f"teacher for {', '.join(entry.teacher_for)}"] if entry.teacher_for else []
        roles += [f"student for {', '.join(entry.student_for)}"] if entry.student_for else []
        print(f"  {entry.name}: {'; '.join([entry.description, *roles])}")
    if not read_registry():
        print("  none")
    return 0
