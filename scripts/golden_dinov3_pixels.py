"""Write tests/golden/dinov3_pixels.npz: what transformers' processor of images for DINOv3 makes of one by default.

python -m pip install torchvision==0.28.0 transformers==5.23.0
python scripts/golden_dinov3_pixels.py
"""

from pathlib import Path

import numpy as np
from transformers import DINOv3ViTImageProcessor

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def main() -> None:
    """Write ``image`` (3, 224, 224) in bytes, ``pixels`` of the same shape, and ``resample``, Pillow's number."""
    image = np.random.RandomState(0).randint(0, 256, (3, 224, 224)).astype(np.uint8)
    image[:, 20:] = image[:, :1, :1]  # small when it is packed
    processor = DINOv3ViTImageProcessor()
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    np.savez_compressed(
        GOLDEN / "dinov3_pixels.npz", image=image, pixels=pixels, resample=np.array(int(processor.resample))
    )


if __name__ == "__main__":
    main()
