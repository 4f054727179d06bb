"""What ranks need, imported once in the process that they are forked from."""

import ridgeline.passes.parallel
import transformers.models.gemma.modeling_gemma
import transformers.models.gemma2.modeling_gemma2
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401
