//! The engine driven directly, for `make bench`: reads a prompt a line, decodes 64 tokens, prints
//! `prefill_tokens prefill_seconds decode_tokens decode_seconds`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring tool: it may fail by panicking")]

use std::io::BufRead;
use std::num::NonZeroU32;
use std::time::Instant;

use llama_cpp_4::common_sampler::{CommonSampler, CommonSamplerParams};
use llama_cpp_4::context::params::{LlamaContextParams, LlamaFlashAttnType};
use llama_cpp_4::llama_backend::LlamaBackend;
use llama_cpp_4::llama_batch::LlamaBatch;
use llama_cpp_4::model::params::LlamaModelParams;
use llama_cpp_4::model::{AddBos, LlamaModel, Special};
use llama_cpp_4::token::LlamaToken;

const DECODED: usize = 64;

fn main() {
    let path = std::env::args().nth(1).unwrap();
    let mut backend = LlamaBackend::init().unwrap();
    backend.void_logs();
    sarai_llama::refuse_tiles();
    let model = LlamaModel::load_from_file(&backend, path, &LlamaModelParams::default()).unwrap();
    let threads = i32::try_from(std::thread::available_parallelism().unwrap().get()).unwrap();
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(2048))
        .with_n_batch(512)
        .with_n_ubatch(512)
        .with_n_outputs_max(1)
        .with_flash_attn_type(LlamaFlashAttnType::Enabled)
        .with_no_perf(true)
        .with_n_threads(threads)
        .with_n_threads_batch(threads);
    let mut context = model.new_context(&backend, params).unwrap();
    let mut batch = LlamaBatch::new(512, 1);
    for prompt in std::io::stdin().lock().lines().map_while(Result::ok) {
        context.clear_kv_cache();
        let mut params = CommonSamplerParams::new();
        let mut scalars = params.scalars();
        scalars.temp = 0.0;
        scalars.no_perf = true;
        params.set_scalars(&scalars);
        // The same bans as the requests over HTTP have.
        for end in std::env::args().skip(2) {
            params.add_logit_bias(LlamaToken(end.parse().unwrap()), f32::NEG_INFINITY).unwrap();
        }
        let mut sampler = CommonSampler::new(&model, &mut params).unwrap();
        let started = Instant::now();
        let tokens = model.str_to_token_with_special(&prompt, AddBos::Always, Special::Tokenize).unwrap();
        for start in (0..tokens.len()).step_by(512) {
            batch.clear();
            for position in start..tokens.len().min(start + 512) {
                let at = i32::try_from(position).unwrap();
                batch.add(tokens[position], at, &[0], position + 1 == tokens.len()).unwrap();
            }
            context.decode(&mut batch).unwrap();
        }
        for &token in &tokens {
            sampler.accept(token, false);
        }
        let mut token = sampler.sample(&mut context, batch.n_tokens() - 1, false).unwrap();
        let prefill = started.elapsed();
        let started = Instant::now();
        for n in 1..DECODED {
            sampler.accept(token, true);
            batch.clear();
            batch.add(token, i32::try_from(tokens.len() + n - 1).unwrap(), &[0], true).unwrap();
            context.decode(&mut batch).unwrap();
            token = sampler.sample(&mut context, 0, false).unwrap();
        }
        let decode = started.elapsed();
        println!("{} {} {} {}", tokens.len(), prefill.as_secs_f64(), DECODED - 1, decode.as_secs_f64());
    }
}
