"""Facts on the five data sets of the field: sizes of their published splits, and the class splits of two of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

N_WAY = 5


# What 5-way 5-shot episodes take of a class: five shots, and the queries that the shipped configs take, five a class in
# training and one in evaluation.
NEEDED = {"train": 5 + 5, "val": 5 + 1, "test": 5 + 1}


@dataclass(frozen=True)
class Benchmark:
    """What is known of a data set before any file is read.

    Attributes:
        n_classes: Classes of the published train, val and test split.
        n_videos: Videos of the published train, val and test split.
        class_split: The classes of each split, spelled as the data set's folders, where a split is all videos of its
            classes; empty where it is a list of videos.
        group: A regular expression that finds what a video was cut from in its path without the extension; empty where
            names do not tell.
        group_rule: The same in words.
    """

    n_classes: tuple[int, int, int]
    n_videos: tuple[int, int, int]
    class_split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    group: str = ""
    group_rule: str = ""


_HMDB51 = {
    "train": """
        brush_hair catch chew clap climb climb_stairs dive draw_sword dribble drink fall_floor flic_flac handstand hug
        jump kiss pullup punch push ride_bike ride_horse shake_hands shoot_bow situp stand sword sword_exercise throw
        turn walk wave""",
    "val": """
        cartwheel eat golf hit laugh shoot_ball shoot_gun smile somersault swing_baseball""",
    "test": """
        fencing kick kick_ball pick pour pushup run sit smoke talk""",
}


_UCF101 = {
    "train": """
        ApplyEyeMakeup Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk BenchPress
        Biking Billiards BlowDryHair BodyWeightSquats Bowling BoxingPunchingBag BoxingSpeedBag BreastStroke
        BrushingTeeth CricketBowling Drumming Fencing FieldHockeyPenalty FrisbeeCatch FrontCrawl Haircut Hammering
        HeadMassage HulaHoop JavelinThrow JugglingBalls JumpingJack Kayaking Knitting LongJump Lunges MilitaryParade
        Mixing MoppingFloor Nunchucks ParallelBars PizzaTossing PlayingCello PlayingDhol PlayingFlute PlayingPiano
        PlayingSitar PlayingTabla PlayingViolin PoleVault PullUps PushUps Rafting RopeClimbing Rowing ShavingBeard
        Skijet SoccerJuggling SoccerPenalty SumoWrestling Swing TableTennisShot TaiChi ThrowDiscus TrampolineJumping
        Typing UnevenBars WalkingWithDog WallPushups WritingOnBoard YoYo""",
    "val": """
        ApplyLipstick CricketShot HammerThrow HandstandPushups HighJump HorseRiding PlayingDaf PlayingGuitar Shotput
        SkateBoarding""",
    "test": """
        BlowingCandles CleanAndJerk CliffDiving CuttingInKitchen Diving FloorGymnastics GolfSwing HandstandWalking
        HorseRace IceDancing JumpRope PommelHorse Punch RockClimbingIndoor SalsaSpin Skiing SkyDiving StillRings
        Surfing TennisSwing VolleyballSpiking""",
}


def _class_split(names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {split: tuple(text.split()) for split, text in names.items()}


BENCHMARKS: Mapping[str, Benchmark] = {
    "kinetics100": Benchmark(
        (64, 12, 24),
        (6400, 1200, 2400),
        group=r"(?:^|/)([\w-]{11})(?![0-9A-Za-z-])[^/]*$",
        group_rule="the first 11 characters of its name, the video's id",
    ),
    "ssv2": Benchmark((64, 12, 24), (67013, 1926, 2857)),
    "ssv2_small": Benchmark((64, 12, 24), (6400, 1200, 2400)),
    "hmdb51": Benchmark(
        (31, 10, 10),
        (4280, 1194, 1292),
        _class_split(_HMDB51),
        group=r"(?:^|/)([^/]+)_[hulf]_[cn]m_np\d+_(?:fr|ba|le|ri)_(?:bad|med|goo)_\d+$",
        group_rule="its name without the codes at the end, such as _f_cm_np1_fr_med_12",
    ),
    "ucf101": Benchmark(
        (70, 10, 21),
        (9154, 1421, 2745),
        _class_split(_UCF101),
        group=r"(?:^|/)v_([^/]+_g\d+)_c\d+$",
        group_rule="the class and the gNN of its name",
    ),
}
