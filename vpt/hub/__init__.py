"""Task files on the Hugging Face Hub."""

from vpt.hub.repository import download, from_pretrained, push_to_hub

__all__ = ["download", "from_pretrained", "push_to_hub"]
