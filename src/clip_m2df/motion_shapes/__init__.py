"""The embedded benchmark: short videos of coloured shapes that move, rendered here.

Four families of classes. In ``demo`` a class is a colour, a shape and a motion, and its label is a sentence: "a red
star moving to the left"; many classes share their appearance (colour and shape) with others of their split and differ
in the motion alone, so that one frame does not tell them apart. ``scene`` is made in the same way, but nearly all of a
class is its appearance. In ``order`` a class is what happens, "something moving up then growing", whatever it happens
to; each class has a twin, the same events played backwards. In ``mixed`` several classes share each appearance, so that
prompts are right about half the time, and motion decides.

No appearance of the val or test videos occurs in a training video, nor in what the tiny CLIP of
``clip_m2df/assets/tiny_clip`` was trained on.
"""

from clip_m2df.motion_shapes.classes import CLASSES as CLASSES
from clip_m2df.motion_shapes.classes import COLOURS as COLOURS
from clip_m2df.motion_shapes.classes import FAMILIES as FAMILIES
from clip_m2df.motion_shapes.classes import appearances_of as appearances_of
from clip_m2df.motion_shapes.classes import shared_appearance_classes as shared_appearance_classes
from clip_m2df.motion_shapes.long_videos import Action as Action
from clip_m2df.motion_shapes.long_videos import render_long as render_long
from clip_m2df.motion_shapes.rendering import NO_KNOBS as NO_KNOBS
from clip_m2df.motion_shapes.rendering import Knobs as Knobs
from clip_m2df.motion_shapes.rendering import render as render
from clip_m2df.motion_shapes.scenes import render_clip as render_clip
