"""Export of a trained drafter: the heads of RUN/drafter for vLLM."""

from pathlib import Path

from petl.adapters.export.medusa import export_medusa, serving_line
from petl.efficiency.drafting.folder import load_drafter, read
from petl.errors import InputError
from petl.generation.inference.loading import load_language_model


def export_drafter(
    folder: str, out: Path, *, tolerance: float | None = None, trust_remote_code: bool = False
) -> list[str]:
    """Write the heads of a drafter for vLLM; return lines that say how they are used.

    Args:
        folder: of the drafter, in that of its model.
        out: folder: new or empty.
        tolerance: of other formats; none here, since the tensors are copied.

    Raises:
        InputError: there is no drafter, or none that vLLM computes; or a tolerance is given.
    """
    if tolerance is not None:
        raise InputError(f"--tolerance {tolerance} is for adapters: leave it out with --vllm")
    source = Path(folder).absolute()
    # before the model is loaded, which takes longer
    heads = read(source)["fields"].get("heads", 0)
    # the rows of the head are those of the model, so it is loaded, too
    language = load_language_model(
        source.parent, drafting="none", trust_remote_code=trust_remote_code
    )
    export_medusa(load_drafter(source, language.base, language.tokenizer), out)
    lines = [f"Medusa heads: {out}", serving_line(out, heads)]
    if language.adapters:
        lines.append(f"MODEL is the merged model: petl merge {Path(folder).parent} MODEL")
    return lines
