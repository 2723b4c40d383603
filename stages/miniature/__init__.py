"""The small world and the small frozen models that every command runs on without a download.

``world`` draws mp4 videos with labels; ``assets`` makes the configs and tokenizers in the folders beside this file.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CLIP_FOLDER = FOLDER / "clip"  # for open_clip.add_model_config
CLIP_MODEL = "miniature-vit"
DIT_FOLDER = FOLDER / "dit"  # transformer/config.json and vae/config.json, for diffusers
LLM_FOLDER = FOLDER / "llm"  # config.json and tokenizer files, for transformers' Auto classes
QFORMER_TOKENIZER = FOLDER / "qformer_tokenizer"  # a BERT word-piece vocabulary
