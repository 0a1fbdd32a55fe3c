"""Model parts in the reference's form: pure class methods that ask the noiser for every product."""

from . import common as common

__all__ = ["common"]
