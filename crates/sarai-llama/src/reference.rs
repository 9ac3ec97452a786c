//! The same numbers for an answer whatever is computed beside it.
//!
//! llama.cpp's fast kernels add up in another order for one row than for several, and for few threads than for many. Its
//! reference kernels take each row by itself. It chooses them by a flag of its CPU backend, which a context makes for
//! itself and shows nobody: so the backend is caught where it is made.

use std::ffi::{c_char, c_void};
use std::sync::OnceLock;

use llama_cpp_sys_4::{
    GGML_BACKEND_DEVICE_TYPE_CPU, ggml_backend_cpu_set_use_ref, ggml_backend_dev_by_type, ggml_backend_dev_init,
    ggml_backend_dev_t, ggml_backend_free, ggml_backend_t,
};

type MakeBackend = unsafe extern "C" fn(ggml_backend_dev_t, *const c_char) -> ggml_backend_t;

/// The first functions of ggml's `ggml_backend_device_i`, with which a device begins.
#[repr(C)]
struct DeviceFunctions {
    get_name: *const c_void,
    get_description: *const c_void,
    get_memory: *const c_void,
    get_type: *const c_void,
    get_props: *const c_void,
    init_backend: MakeBackend,
}

/// What makes the CPU's backend.
static MAKE: OnceLock<MakeBackend> = OnceLock::new();
/// Set once a backend was caught.
static CAUGHT: OnceLock<()> = OnceLock::new();

/// Has all that this process computes from now on computed by the reference kernels. Nothing else may use llama.cpp meanwhile.
///
/// # Errors
/// This llama.cpp makes its backends in another way.
#[expect(unsafe_code, reason = "llama.cpp's C structs")]
pub fn use_it() -> Result<(), String> {
    if CAUGHT.get().is_some() {
        return Ok(());
    }
    // SAFETY: looks a device up; it lives as long as the process.
    let device = unsafe { ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) };
    let functions = device.cast::<DeviceFunctions>();
    if functions.is_null() {
        return Err("llama.cpp has no CPU backend".into());
    }
    // SAFETY: a device is a static variable that begins with these functions, and nobody else uses it now.
    let made = unsafe { std::ptr::replace(&raw mut (*functions).init_backend, make_reference) };
    let _ = MAKE.set(made);
    // SAFETY: the device is the CPU's; what it makes is freed by its own function, once.
    let is_caught = unsafe {
        let backend = ggml_backend_dev_init(device, std::ptr::null());
        ggml_backend_free(backend);
        CAUGHT.get().is_some()
    };
    if !is_caught {
        // SAFETY: as above.
        unsafe { (*functions).init_backend = made };
    }
    if is_caught { Ok(()) } else { Err("`deterministic` is not known to this version of llama.cpp".into()) }
}

#[expect(unsafe_code, reason = "llama.cpp's callback")]
unsafe extern "C" fn make_reference(device: ggml_backend_dev_t, params: *const c_char) -> ggml_backend_t {
    let Some(make) = MAKE.get() else { return std::ptr::null_mut() };
    // SAFETY: called in its place, with its arguments; what it makes is a CPU backend.
    unsafe {
        let backend = make(device, params);
        if !backend.is_null() {
            ggml_backend_cpu_set_use_ref(backend, true);
            let _ = CAUGHT.set(());
        }
        backend
    }
}
