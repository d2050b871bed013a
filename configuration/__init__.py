"""Configuration classes."""

from modeling_dms.configuration.configuration_dms import *  # noqa: F403
from modeling_dms.configuration.configuration_dms import __all__ as __all__
