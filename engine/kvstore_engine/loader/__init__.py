"""Loads models: GGUF files, Hugging Face directories, and tiny ones made for tests."""

from kvstore_engine.loader.load import LoadedModel, load_model
from kvstore_engine.model_source import ModelLoadError

__all__ = ["LoadedModel", "ModelLoadError", "load_model"]
