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
use llama_cpp_4::context::params::{LlamaContextParams, LlamaFlashAttnType};
use llama_cpp_4::llama_backend::LlamaBackend;
use llama_cpp_4::model::LlamaModel;
use llama_cpp_4::quantize::GgmlType;
use sarai_core::frame::LoadSpec;
use sarai_core::{Bytes, EngineMemory, KvType};

/// Whether a load takes memory for tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Tensors are mapped, or copied where they are repacked.
    Real,
    /// Only sizes are computed; such a model computes nothing.
    DryRun,
}

/// Loads the file.
///
/// # Errors
/// llama.cpp cannot; its own log says why.
#[expect(unsafe_code, reason = "llama.cpp's C functions")]
pub fn load(spec: &LoadSpec, allocation: Allocation) -> Result<LlamaModel, String> {
    let failed = || format!("llama.cpp cannot load {}", spec.path.display());
    let path = CString::new(spec.path.as_os_str().as_bytes()).map_err(|_| failed())?;
    // SAFETY: takes nothing and returns a struct of plain values.
    let mut params = unsafe { llama_cpp_sys_4::llama_model_default_params() };
    let dry = allocation == Allocation::DryRun;
    params.no_alloc = dry;
    params.load_mode = if dry { llama_cpp_sys_4::LLAMA_LOAD_MODE_NONE } else { llama_cpp_sys_4::LLAMA_LOAD_MODE_MMAP };
    params.use_extra_bufts = spec.repack;
    // SAFETY: the path is a C string that outlives the call, and the parameters hold no pointers but defaults.
    let model = unsafe { llama_cpp_sys_4::llama_model_load_from_file(path.as_ptr(), params) };
    let model = NonNull::new(model).ok_or_else(failed)?;
    // SAFETY: `LlamaModel` is `repr(transparent)` over this pointer, whose only owner is here.
    Ok(unsafe { std::mem::transmute::<NonNull<llama_cpp_sys_4::llama_model>, LlamaModel>(model) })
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
        .new_context(backend, context_params(spec))
        .map_err(|error| format!("llama.cpp cannot make a context of {} tokens ({error})", spec.context_tokens))
}

/// Tokens that one step can hold: one of every sequence at least.
pub fn step_tokens(spec: &LoadSpec) -> u32 {
    spec.ubatch_tokens.max(spec.parallel)
}

fn context_params(spec: &LoadSpec) -> LlamaContextParams {
    let threads = i32::try_from(spec.threads).unwrap_or(1);
    let kv = match spec.kv {
        KvType::F16 => GgmlType::F16,
        KvType::Q8_0 => GgmlType::Q8_0,
        KvType::Q4_0 => GgmlType::Q4_0,
    };
    let flash = if spec.flash_attention { LlamaFlashAttnType::Enabled } else { LlamaFlashAttnType::Disabled };
    LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(spec.context_tokens.saturating_mul(spec.parallel)))
        .with_n_seq_max(spec.parallel)
        .with_n_batch(step_tokens(spec))
        .with_n_ubatch(step_tokens(spec))
        .with_n_outputs_max(spec.parallel)
        .with_swa_full(false)
        .with_kv_unified(false)
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

/// Gives back the pages of the file that loading touched: what computing needs of them comes back by itself,
/// what was repacked never does. They stay in the page cache as long as nobody needs the memory.
pub fn release_mapping(path: &Path) {
    advise_mapping(path, rustix::mm::Advice::LinuxDontNeed);
}

/// Pages out the mapped weights of an idle worker and returns free heap to the system.
pub fn trim(path: &Path) {
    advise_mapping(path, rustix::mm::Advice::LinuxPageOut);
    trim_heap();
}

/// Returns to the system what freed contexts leave behind in the allocator.
#[expect(unsafe_code, reason = "glibc's malloc_trim")]
pub fn trim_heap() {
    // SAFETY: takes a number, and locks the allocator itself.
    unsafe { libc::malloc_trim(0) };
}

#[expect(unsafe_code, reason = "madvise takes addresses")]
fn advise_mapping(path: &Path, advice: rustix::mm::Advice) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let name = path.to_string_lossy();
    // Of a split file, all parts are mapped.
    let (stem, part) = name.rsplit_once("-00001-of-").unwrap_or((&name, ""));
    for (start, end) in mappings_of(&maps, stem, part) {
        let address = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: the range is a file mapping that is only read, so dropping its pages loses nothing: they come
        // back from the file.
        if let Err(error) = unsafe { rustix::mm::madvise(address, end - start, advice) } {
            crate::log::warn(&format!("madvise on {}: {error}", path.display()));
        }
    }
}

/// The address ranges that files are mapped to whose names begin and end so.
fn mappings_of<'a>(maps: &'a str, stem: &'a str, end: &'a str) -> impl Iterator<Item = (usize, usize)> + 'a {
    let is_ours = move |line: &&str| {
        let name = line.find('/').map_or("", |at| &line[at..]);
        name == stem || (!end.is_empty() && name.starts_with(stem) && name.ends_with(end))
    };
    maps.lines().filter(is_ours).filter_map(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::mappings_of;

    #[test]
    fn the_ranges_of_a_mapped_file_are_found() {
        let maps = "7f00-7f10 r--s 00000000 08:01 5  /models/a b.gguf\n7f20-7f30 rw-p 00000000 00:00 0\n\
                    7f40-7f50 r--s 00000000 08:01 6  /m/s-00001-of-00002.gguf\n7f60-7f70 r--s 0 08:01 7  /m/s-00002-of-00002.gguf\n";
        assert_eq!(mappings_of(maps, "/models/a b.gguf", "").collect::<Vec<_>>(), [(0x7f00, 0x7f10)]);
        let parts: Vec<_> = mappings_of(maps, "/m/s", "00002.gguf").collect();
        assert_eq!(parts, [(0x7f40, 0x7f50), (0x7f60, 0x7f70)]);
    }
}
