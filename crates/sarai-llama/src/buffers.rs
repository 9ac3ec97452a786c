//! llama.cpp's large buffers stay with the worker: a copy of it, in which a form is tried, has none of them. It needs no copied weights, no
//! cache and no scratch; and while it has them, each page that a step writes is there twice, and in no plan.
//!
//! llama.cpp has no setting for it, so the functions are wrapped by which its CPU buffers are had and freed. What it allocates otherwise is
//! copied: graphs, what threads work with, and weights in the layout of CPUs with AMX, which no step writes.

use std::ffi::c_void;
use std::sync::OnceLock;

use llama_cpp_sys_4::{
    ggml_backend_buffer_get_base, ggml_backend_buffer_get_size, ggml_backend_buffer_t, ggml_backend_buffer_type_t,
    ggml_backend_cpu_buffer_type,
};
use rustix::mm::{Advice, madvise};

/// A buffer that is smaller is copied: its pages are few, and each one that is not copied is a mapping of its own.
const LARGE: usize = 1 << 20;

type Allocate = unsafe extern "C" fn(ggml_backend_buffer_type_t, usize) -> ggml_backend_buffer_t;
type Free = unsafe extern "C" fn(ggml_backend_buffer_t);

/// The first functions of ggml's `ggml_backend_buffer_type_i`, with which a type of buffers begins.
#[repr(C)]
struct TypeFunctions {
    get_name: *const c_void,
    alloc_buffer: Allocate,
}

/// The first function of ggml's `ggml_backend_buffer_i`, with which a buffer begins.
#[repr(C)]
struct BufferFunctions {
    free_buffer: Option<Free>,
}

/// What a CPU buffer is had by.
static ALLOCATE: OnceLock<Allocate> = OnceLock::new();
/// What each of them is freed by: it makes all of one kind.
static FREE: OnceLock<Free> = OnceLock::new();

/// Has no copy of this process have the buffers that are made from now on. Nothing else may use llama.cpp meanwhile.
#[expect(unsafe_code, reason = "llama.cpp's C structs")]
pub fn keep_from_copies() {
    if ALLOCATE.get().is_some() {
        return;
    }
    // SAFETY: takes nothing. The type is a static variable that begins with these functions, and nobody else uses it now.
    unsafe {
        let functions = ggml_backend_cpu_buffer_type().cast::<TypeFunctions>();
        let _ = ALLOCATE.set((*functions).alloc_buffer);
        (*functions).alloc_buffer = allocate;
    }
}

#[expect(unsafe_code, reason = "llama.cpp's callback")]
unsafe extern "C" fn allocate(kind: ggml_backend_buffer_type_t, size: usize) -> ggml_backend_buffer_t {
    let Some(allocate) = ALLOCATE.get() else { return std::ptr::null_mut() };
    // SAFETY: called in its place, with its arguments; what it makes begins with these functions, and is nobody else's yet.
    unsafe {
        let buffer = allocate(kind, size);
        if !buffer.is_null() && size >= LARGE {
            let functions = buffer.cast::<BufferFunctions>();
            if let Some(freed_by) = (*functions).free_buffer {
                let _ = FREE.set(freed_by);
                (*functions).free_buffer = Some(free);
                // One that is copied all the same costs memory, for a moment.
                let _ = advise(buffer, Advice::LinuxDontFork);
            }
        }
        buffer
    }
}

#[expect(unsafe_code, reason = "llama.cpp's callback")]
unsafe extern "C" fn free(buffer: ggml_backend_buffer_t) {
    let Some(freed_by) = FREE.get() else { return };
    // SAFETY: called in its place, with its argument.
    unsafe {
        // The allocator may use the pages again, for what a copy does need.
        match advise(buffer, Advice::LinuxDoFork) {
            Ok(()) => freed_by(buffer),
            Err(error) => crate::log::warn(&format!("a buffer is not freed: {error}")),
        }
    }
}

/// Says of the whole pages of a buffer whether a copy has them.
///
/// # Safety
/// It is a buffer of the CPU, and not freed yet.
#[expect(unsafe_code, reason = "madvise takes addresses")]
unsafe fn advise(buffer: ggml_backend_buffer_t, advice: Advice) -> rustix::io::Result<()> {
    let page = rustix::param::page_size();
    // SAFETY: the caller's buffer; nothing of it is dropped by the advice.
    unsafe {
        let base = ggml_backend_buffer_get_base(buffer);
        let before = base.addr().next_multiple_of(page) - base.addr();
        let whole = ggml_backend_buffer_get_size(buffer).saturating_sub(before) / page * page;
        madvise(base.byte_add(before), whole, advice)
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "llama.cpp's C functions")]
mod tests {
    use llama_cpp_sys_4::{ggml_backend_buffer_free, ggml_backend_buft_alloc_buffer};

    use super::*;

    /// What smaps says of copies for the mapping around an address, if there is one.
    fn is_copied(address: usize) -> Option<bool> {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let mut is_here = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let number = |digits| usize::from_str_radix(digits, 16).ok();
            if let Some((from, to)) = range.and_then(|(from, to)| Some((number(from)?, number(to)?))) {
                is_here = (from..to).contains(&address);
            } else if is_here && line.starts_with("VmFlags:") {
                return Some(!line.contains(" dc"));
            }
        }
        None
    }

    #[test]
    fn a_copy_has_no_large_buffers_and_what_was_freed_is_copied_again() {
        keep_from_copies();
        keep_from_copies();
        // Below what glibc maps by itself at the most, and beyond it.
        for size in [LARGE, 20 << 20, 80 << 20] {
            // SAFETY: a buffer of the CPU, which is freed once.
            let address = unsafe {
                let buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
                let address = ggml_backend_buffer_get_base(buffer).addr() + size / 2;
                assert_eq!(is_copied(address), Some(false));
                ggml_backend_buffer_free(buffer);
                address
            };
            assert_ne!(is_copied(address), Some(false), "it is gone, or the allocator has it");
        }
        // SAFETY: as above.
        unsafe {
            let small = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), LARGE - 1);
            assert_eq!(is_copied(ggml_backend_buffer_get_base(small).addr()), Some(true));
            ggml_backend_buffer_free(small);
        }
    }
}
