"""``predict`` is tested with the models and videos of the classifier's tests."""

from tests.classifier.conftest import folder, images, labelled, support

__all__ = ["folder", "images", "labelled", "support"]
