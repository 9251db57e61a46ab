//! Every row against what transformers and vLLM do, by the tables in `../data`.

mod caution;
mod experts;
mod facts;
mod vllm;
