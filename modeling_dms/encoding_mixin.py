"""The images of a call, encoded once and watched meanwhile."""

import inspect
from typing import Any, ClassVar

from transformers.utils import ModelOutput

from modeling_dms.mixin import DMSMixin
from modeling_dms.observe.images import Images, image_statistics, there
from modeling_dms.observe.layers import kept_states


class EncodingMixin(DMSMixin):
    """Adds what is observed of images to `get_image_features` of a class that continues prompts."""

    # parameters of the vanilla class's `forward` that `get_image_features` takes
    _image_parameters: ClassVar[tuple[str, ...]] = ()

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the vanilla class's; its output also holds `statistics`, what typicality reads of the vision tower, and
        `pixels`, what tells damage."""
        states, outputs = kept_states(
            lambda: super(EncodingMixin, self).get_image_features(*args, **kwargs), self._vision_layers
        )
        if isinstance(outputs, ModelOutput):
            given = {**dict(zip(self._image_parameters, args, strict=False)), **kwargs}
            pooled = there(outputs.pooler_output)
            outputs.statistics = image_statistics(states, pooled, self._parts(**given))
            outputs.pixels = None if self._is_static else self._pixel_statistics(given, pooled)
        return outputs

    def _observed_images(self, inputs: dict[str, Any]) -> Images | None:
        """The images of a call; `None` without any. Its pixels are replaced by `mm_encoder_outputs`."""
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        pixels = inputs.get("pixel_values")
        if encoded is not None:
            if pixels is not None:
                raise ValueError("pass either `pixel_values` or `mm_encoder_outputs`, not both")
            return Images.of(encoded)
        if pixels is None:
            return None
        self._check_images(pixels)
        given = {name: inputs[name] for name in self._image_parameters if inputs.get(name) is not None}
        encoded = self.get_image_features(**given, return_dict=True)
        inputs["mm_encoder_outputs"] = {"image": encoded}
        inputs["pixel_values"] = None
        if inputs.get("pixel_values_videos") is not None:  # the vanilla classes take none beside encoded images
            names = inspect.signature(self.get_video_features).parameters
            given = {name: inputs[name] for name in names if inputs.get(name) is not None}
            inputs["mm_encoder_outputs"]["video"] = self.get_video_features(**given, return_dict=True)
            inputs["pixel_values_videos"] = None
        return Images.of(encoded)

    def with_images_encoded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of `forward` with `mm_encoder_outputs` in place of pixels, to be used for several calls."""
        encoded = {"input_ids": None, **inputs}
        self._observed_images(encoded)
        return {name: value for name, value in encoded.items() if value is not None}
