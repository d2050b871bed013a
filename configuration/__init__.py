"""Configuration classes."""

from modeling_dms.configuration.configuration_dms import DMSBlip2Config, DMSConfig, DMSLlavaConfig


__all__ = ["DMSBlip2Config", "DMSConfig", "DMSLlavaConfig"]
