"""Configuration classes."""

from modeling_dms.configuration.configuration_dms import (
    DMSBlip2Config,
    DMSConfig,
    DMSInternVLConfig,
    DMSLlavaConfig,
)


__all__ = ["DMSBlip2Config", "DMSConfig", "DMSInternVLConfig", "DMSLlavaConfig"]
