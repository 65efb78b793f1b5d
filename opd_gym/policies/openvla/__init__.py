"""OpenVLA and OpenVLA-OFT with discrete tokens: the published checkpoints as a body of ``VLAPolicy``."""

from transformers import AutoConfig, AutoModel
from transformers.utils.versions import require_version

from opd_gym.policies.openvla.checkpoints import complete_checkpoint
from opd_gym.policies.openvla.configuration import OpenVLAConfig
from opd_gym.policies.openvla.modeling import OpenVLAModel

# Its vision transformers have other names in older versions, and its decoders are always causal.
require_version("transformers>=5.18", "OpenVLA needs a newer one: pip install -U transformers")

AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
AutoModel.register(OpenVLAConfig, OpenVLAModel, exist_ok=True)

__all__ = ["OpenVLAConfig", "OpenVLAModel", "complete_checkpoint"]
