from typing import Literal

Decoder = Literal["auto", "decord", "pyav", "torchcodec"]
