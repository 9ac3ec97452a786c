//! Loading a file and sizing its context, for real or as a dry run that allocates nothing.
//!
//! The bindings do not show two settings of llama.cpp that decide about memory, whether weights are repacked
//! and the dry run, so the model is loaded through its C functions here.

use std::ffi::CString;
use std::num::NonZeroU32;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::context::params::{LlamaContextParams, LlamaFlashAttnType, LlamaPoolingType};
use llama_cpp_4::llama_backend::LlamaBackend;
use llama_cpp_4::model::LlamaModel;
use llama_cpp_4::quantize::GgmlType;
use sarai_core::frame::{LoadSpec, LoadedInfo};
use sarai_core::{Bytes, EngineMemory, KvType, Purpose, split};

use crate::{buffers, reference, tiles};

/// Whether a load takes memory for tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Tensors are mapped, or copied where they are repacked.
    Real,
    /// All tensors are copied: pages of the file are nobody's then.
    Copied,
    /// Only sizes are computed; such a model computes nothing.
    DryRun,
}

/// Loads the file.
///
/// # Errors
/// llama.cpp cannot; its own log says why.
#[expect(unsafe_code, reason = "llama.cpp's C functions")]
pub fn load(spec: &LoadSpec, allocation: Allocation, mut tell: impl FnMut(u8)) -> Result<LlamaModel, String> {
    let failed = || format!("llama.cpp cannot load {}", spec.path.display());
    let path = CString::new(spec.path.as_os_str().as_bytes()).map_err(|_| failed())?;
    if !dry_run(allocation) {
        read_ahead(&spec.path);
    }
    // SAFETY: takes nothing and returns a struct of plain values.
    let mut params = unsafe { llama_cpp_sys_4::llama_model_default_params() };
    let dry = dry_run(allocation);
    params.no_alloc = dry;
    params.load_mode = match allocation {
        Allocation::Real => llama_cpp_sys_4::LLAMA_LOAD_MODE_MMAP,
        Allocation::Copied | Allocation::DryRun => llama_cpp_sys_4::LLAMA_LOAD_MODE_NONE,
    };
    params.use_extra_bufts = spec.repack && tiles::refuse();
    if spec.deterministic {
        reference::use_it()?;
    }
    buffers::keep_from_copies();
    let mut told = 0;
    let mut progress = |part: f32| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is within 0 and 100")]
        let percent = (100.0 * part.clamp(0.0, 1.0)) as u8;
        if percent > told {
            told = percent;
            tell(percent);
        }
    };
    let mut progress: &mut dyn FnMut(f32) = &mut progress;
    params.progress_callback = Some(on_progress);
    params.progress_callback_user_data = std::ptr::from_mut(&mut progress).cast();
    // SAFETY: the path is a C string that outlives the call, and so does what is told of the progress, which
    // nobody else uses meanwhile; the other pointers among the parameters are defaults.
    let model = unsafe { llama_cpp_sys_4::llama_model_load_from_file(path.as_ptr(), params) };
    let model = NonNull::new(model).ok_or_else(failed)?;
    // SAFETY: `LlamaModel` is `repr(transparent)` over this pointer, whose only owner is here.
    Ok(unsafe { std::mem::transmute::<NonNull<llama_cpp_sys_4::llama_model>, LlamaModel>(model) })
}

/// Tells of a load's progress; llama.cpp calls it while it loads, on the same thread.
#[expect(unsafe_code, reason = "llama.cpp's callback")]
unsafe extern "C" fn on_progress(part: f32, data: *mut std::ffi::c_void) -> bool {
    // SAFETY: `load` hands in this pointer, to what lives as long as its call.
    let tell = unsafe { &mut *data.cast::<&mut dyn FnMut(f32)>() };
    tell(part);
    true
}

fn dry_run(allocation: Allocation) -> bool {
    allocation == Allocation::DryRun
}

/// Has the file read in the background, in large pieces: mapping it would fault for every piece and wait for each.
fn read_ahead(path: &Path) {
    for file in split::parts(path).into_iter().filter_map(|part| std::fs::File::open(part).ok()) {
        // It is only a hint: without it the load is slower.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::WillNeed);
    }
}

/// Makes a context of the sizes that the spec names.
///
/// # Errors
/// llama.cpp cannot, for lack of memory or because the model does not allow these settings.
pub fn context<'model>(
    spec: &LoadSpec,
    backend: &LlamaBackend,
    model: &'model LlamaModel,
) -> Result<LlamaContext<'model>, String> {
    model
        .new_context(backend, context_params(spec, model))
        .map_err(|error| format!("llama.cpp cannot make a context of {} tokens ({error})", spec.context_tokens))
}

/// llama.cpp holds a multiple of so many tokens.
const CELLS: u32 = 256;

/// Tokens that one sequence can hold.
pub fn sequence_tokens(spec: &LoadSpec) -> u32 {
    spec.context_tokens.checked_next_multiple_of(CELLS).unwrap_or(u32::MAX)
}

/// Tokens that all sequences together can hold.
pub fn pool_tokens(spec: &LoadSpec) -> u32 {
    sequence_tokens(spec).saturating_mul(if spec.shared_context { 1 } else { spec.parallel })
}

/// The context up to which a model rotates positions as it was first trained; others rotate them so whatever their context.
pub fn unstretched_tokens(model: &LlamaModel) -> u32 {
    let text = |key: &str| model.meta_val_str(key, 128).ok();
    let tokens =
        text("general.architecture").and_then(|it| text(&format!("{it}.rope.scaling.original_context_length")));
    tokens.and_then(|tokens| tokens.parse().ok()).unwrap_or(u32::MAX)
}

/// What the server is told of a load.
pub fn info(spec: &LoadSpec, context: &LlamaContext<'_>) -> LoadedInfo {
    LoadedInfo { context_tokens: sequence_tokens(spec).min(context.n_ctx()), memory: memory(context) }
}

/// Tokens that a sliding window covers; 0 if the model has none.
pub fn window(model: &LlamaModel) -> usize {
    usize::try_from(model.n_swa()).unwrap_or(0)
}

/// Tokens that one step can hold: one of every sequence at least.
pub fn step_tokens(spec: &LoadSpec) -> u32 {
    spec.ubatch_tokens.max(spec.parallel)
}

/// Whether the file says how it makes one vector of many.
fn says_pooling(model: &LlamaModel) -> bool {
    let text = |key: &str| model.meta_val_str(key, 64).ok();
    let pooling = text("general.architecture").and_then(|name| text(&format!("{name}.pooling_type")));
    pooling.is_some_and(|pooling| pooling != "0")
}

fn context_params(spec: &LoadSpec, model: &LlamaModel) -> LlamaContextParams {
    let threads = i32::try_from(spec.threads).unwrap_or(1);
    let kv = match spec.kv {
        KvType::F16 => GgmlType::F16,
        KvType::Q8_0 => GgmlType::Q8_0,
        KvType::Q4_0 => GgmlType::Q4_0,
    };
    let flash = if spec.flash_attention { LlamaFlashAttnType::Enabled } else { LlamaFlashAttnType::Disabled };
    let embeds = spec.purpose != Purpose::Answers;
    let pooling = match spec.purpose {
        Purpose::Scores => LlamaPoolingType::Rank,
        // A file that does not say how is meant as most of its kind are.
        Purpose::Vectors if !says_pooling(model) => LlamaPoolingType::Mean,
        _ => LlamaPoolingType::Unspecified,
    };
    LlamaContextParams::default()
        .with_embeddings(embeds)
        .with_pooling_type(pooling)
        .with_n_ctx(NonZeroU32::new(pool_tokens(spec)))
        .with_n_seq_max(spec.parallel)
        .with_n_batch(step_tokens(spec))
        .with_n_ubatch(step_tokens(spec))
        // Of a text that is read whole, each token is put out.
        .with_n_outputs_max(if embeds { 0 } else { spec.parallel * (1 + spec.draft_tokens) })
        .with_swa_full(false)
        // One pool of cells, so that sequences can share what they begin with; but attention adds up in the order of cells.
        .with_kv_unified(embeds || !spec.deterministic)
        .with_flash_attn_type(flash)
        .with_cache_type_k(kv)
        .with_cache_type_v(kv)
        .with_no_perf(true)
        .with_n_threads(threads)
        .with_n_threads_batch(threads)
}

/// What llama.cpp says it allocated, or in a dry run would allocate.
pub fn memory(context: &LlamaContext<'_>) -> EngineMemory {
    let mut memory = EngineMemory::default();
    for entry in context.memory_breakdown() {
        let weights = if entry.buft_name == "CPU" || entry.buft_name == "CPU_Mapped" {
            &mut memory.weights
        } else {
            &mut memory.repacked
        };
        *weights += Bytes(entry.model as u64);
        memory.context += Bytes(entry.context as u64);
        memory.compute += Bytes(entry.compute as u64);
    }
    memory
}
