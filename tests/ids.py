"""
Which of the registered ids can be played where the tests run, and why the others cannot: every id by its name, so that
a new one is in none of these and `test_ids.py` fails until it is checked or named here.
"""

import os

ALL = bool(os.environ.get("OPD_GYM_TEST_ALL_TASKS"))

N_TASKS = {"LiberoSpatial": 10, "LiberoObject": 10, "LiberoGoal": 10, "Libero10": 10}
LIBERO = [f"{suite}-v0" for suite in (*N_TASKS, "Libero90")]
LIBERO_TASKS = [f"{suite}Task{i}-v0" for suite, n in N_TASKS.items() for i in range(n)]
LIBERO_PLUS = [f"LiberoPlus{suite}-v0" for suite in ("Spatial", "Object", "Goal", "10")]
LIBERO_PRO = [
    f"{suite}{change}-v0"
    for suite, changes in {
        "LiberoSpatial": "WithMug WithYellowBook WithMilk Lan Object Swap Task",
        "LiberoObject": (
            "WithMug WithYellowBook TriggeredEpisode MatchedTwoEpisodes NotMatchedTwoEpisodes TwoNormalEpisodes Lan "
            "Object Swap Task"
        ),
        "LiberoGoal": "WithMug WithYellowBook WithMilk Lan Object Swap Task",
        "Libero10": "WithMug WithMilk Lan Object Swap Task",
    }.items()
    for change in changes.split()
]
# In these some tasks have an object whose files are not in the wheel
PARTLY = [
    "LiberoObjectTriggeredEpisode-v0",
    "LiberoObjectMatchedTwoEpisodes-v0",
    "LiberoObjectNotMatchedTwoEpisodes-v0",
]
# In these all tasks have: a sticker, a box or a green mug
NO_OBJECT_FILES = [
    f"{suite}{change}-v0"
    for suite, changes in {
        "LiberoSpatial": "WithRedStick WithBlueStick WithDiffposStick WithRedBox WithGreenMug",
        "LiberoObject": "WithRedStick WithBlueStick WithDiffposStick WithRedBox WithTrigger WithTriggerNew",
        "LiberoGoal": "WithRedStick WithBlueStick WithDiffposStick WithRedBox WithGreenMug WithRotatedStick",
        "Libero10": "WithRedStick WithBlueStick WithDiffposStick WithRedBox",
    }.items()
    for change in changes.split()
]
# LIBERO-PRO's wheel names these suites and has no task files for them
NO_TASK_FILES = [
    f"{suite}{change}-v0"
    for suite in N_TASKS
    for change in ("WithAlphabetSoup", "ObjectOod", "RelationOod", "SemanticOod", "Temp", "Env")
]

# With a robot of boxes, and objects that are primitives or have stand-ins
STAND_INS = (
    "BlocksRankingRgb BlocksRankingSize HandoverBlock StackBlocksThree StackBlocksTwo PickDualBottles PlaceEmptyCup "
    "StackBowlsTwo"
)
ROBOTWIN = [f"RoboTwin{task}-v0" for task in STAND_INS.split()]
# The objects of these are meshes, which are a download
MESHES = (
    "AdjustBottle BeatBlockHammer ClickAlarmclock ClickBell DumpBinBigbin GrabRoller HandoverMic HangingMug LiftPot "
    "MoveCanPot MovePillbottlePad MovePlayingcardAway MoveStaplerPad OpenLaptop OpenMicrowave PickDiverseBottles "
    "PlaceA2bLeft PlaceA2bRight PlaceBreadBasket PlaceBreadSkillet PlaceBurgerFries PlaceCanBasket "
    "PlaceCansPlasticbox PlaceContainerPlate PlaceDualShoes PlaceFan PlaceMousePad PlaceObjectBasket "
    "PlaceObjectScale PlaceObjectStand PlacePhoneStand PlaceShoe PressStapler PutBottlesDustbin PutObjectCabinet "
    "RotateQrcode ScanObject ShakeBottle ShakeBottleHorizontally StackBowlsThree StampSeal TurnSwitch"
)
NO_OBJECTS = [f"RoboTwin{task}-v0" for task in MESHES.split()]
