"""Writes a checkpoint as a CTranslate2 model folder that faster-whisper loads.

`python -m tools.demo_model.export CHECKPOINT FOLDER` replaces the folder's files one by one, each
at once; the tokenizer comes from `--tokenizer` unless the folder has it already.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from ctranslate2.specs import WhisperSpec
from torch import Tensor, nn

from tools.demo_model.model import DECODER_POSITIONS, DemoModel, load
from tools.demo_model.vocabulary import TokenIds

TOKENIZER = Path("worker/demo_model/tokenizer.json")
PREPROCESSOR = {
    "feature_size": 80,
    "sampling_rate": 16000,
    "hop_length": 160,
    "chunk_length": 30,
    "n_fft": 400,
}


def _array(value: Tensor) -> np.ndarray:
    return value.detach().float().contiguous().numpy()


def _set_linear(spec, linear: nn.Linear) -> None:
    spec.weight, spec.bias = _array(linear.weight), _array(linear.bias)


def _set_norm(spec, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = _array(norm.weight), _array(norm.bias)


def _set_feed_forward(spec, norm: nn.LayerNorm, layers: nn.Sequential) -> None:
    _set_norm(spec.layer_norm, norm)
    _set_linear(spec.linear_0, layers[0])
    _set_linear(spec.linear_1, layers[2])


def _set_self_attention(spec, norm: nn.LayerNorm, attention: nn.Module) -> None:
    _set_norm(spec.layer_norm, norm)
    _set_linear(spec.linear[0], attention.qkv)
    _set_linear(spec.linear[1], attention.out)


def _full_embedding(model: DemoModel, ids: TokenIds) -> np.ndarray:
    """One row per Whisper token; ids that training never showed share one vector."""
    compact = _array(model.decoder.embedding)
    full = np.repeat(compact[-1:], ids.size, axis=0)
    full[ids.used] = compact[:-1]
    return full


def whisper_spec(model: DemoModel, ids: TokenIds) -> WhisperSpec:
    """The model as CTranslate2 describes Whisper, in float32."""
    shape = model.shape
    spec = WhisperSpec(shape.encoder_layers, shape.heads, shape.decoder_layers, shape.heads)
    for name in ("conv1", "conv2"):
        _set_linear(getattr(spec.encoder, name), getattr(model.encoder, name))
    spec.encoder.position_encodings.encodings = _array(model.encoder.positions)
    _set_norm(spec.encoder.layer_norm, model.encoder.norm)
    for target, layer in zip(spec.encoder.layer, model.encoder.layers, strict=True):
        _set_self_attention(target.self_attention, layer.attention_norm, layer.attention)
        _set_feed_forward(target.ffn, layer.forward_norm, layer.feed_forward)
    embedding = _full_embedding(model, ids)
    spec.decoder.embeddings.weight = embedding
    spec.decoder.projection.weight = embedding
    spec.decoder.position_encodings.encodings = _array(model.decoder.positions)
    _set_norm(spec.decoder.layer_norm, model.decoder.norm)
    for target, layer in zip(spec.decoder.layer, model.decoder.layers, strict=True):
        _set_self_attention(target.self_attention, layer.attention_norm, layer.attention)
        _set_norm(target.attention.layer_norm, layer.cross_norm)
        _set_linear(target.attention.linear[0], layer.cross.q)
        _set_linear(target.attention.linear[1], layer.cross.kv)
        _set_linear(target.attention.linear[2], layer.cross.out)
        _set_feed_forward(target.ffn, layer.forward_norm, layer.feed_forward)
    spec.register_vocabulary([ids.tokenizer.id_to_token(i) for i in range(ids.size)])
    spec.config.suppress_ids = []
    spec.config.suppress_ids_begin = [*ids.tokenizer.encode(" ").ids, ids.end]
    spec.config.lang_ids = ids.all_languages
    spec.config.alignment_heads = [[shape.decoder_layers - 1, 0]]
    return spec


def export(model: DemoModel, folder: Path, tokenizer: Path, quantization: str = "int8") -> None:
    """Writes `model.bin` and the files beside it that `WhisperModel(folder)` wants."""
    if len(model.decoder.positions) != DECODER_POSITIONS:
        raise ValueError("faster-whisper needs 448 decoder positions")
    folder.mkdir(parents=True, exist_ok=True)
    spec = whisper_spec(model, TokenIds(tokenizer))
    spec.validate()
    spec.optimize(quantization=None if quantization == "float32" else quantization)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        spec.save(partial)
        shutil.copyfile(tokenizer, Path(partial, "tokenizer.json"))
        Path(partial, "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR) + "\n")
        for file in Path(partial).iterdir():
            file.replace(folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--quantization", choices=["int8", "float32"], default="int8")
    options = parser.parse_args()
    with torch.no_grad():
        export(load(options.checkpoint), options.folder, options.tokenizer, options.quantization)
    for file in sorted(options.folder.iterdir()):
        print(f"{file.stat().st_size:>10} {file.name}")


if __name__ == "__main__":
    main()
