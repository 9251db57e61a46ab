//! Every row against what transformers and vLLM do, by the tables in `../data`.

mod architectures;
mod experts;
mod vllm;
