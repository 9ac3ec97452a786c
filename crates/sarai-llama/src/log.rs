//! The worker's log: warnings and errors of llama.cpp and of the worker, one a line, on standard error; its own are marked.
//!
//! The server reads them, keeps the last ones for its crash reports, and writes them into its own log.

use std::ffi::{CStr, c_char, c_void};
use std::io::Write;

use sarai_core::frame::WARNING;

/// Warns whoever reads the server's log; one that cannot be written is not a reason to stop.
pub fn warn(line: &str) {
    let _ = writeln!(std::io::stderr(), "{WARNING}{line}");
}

/// Sends llama.cpp's warnings and errors to standard error, and drops the rest.
#[expect(unsafe_code, reason = "llama.cpp takes its log callback as a C function")]
pub fn capture_llama() {
    // SAFETY: `forward` is a function of the signature asked for, lives as long as the process, and does
    // not read the user data.
    unsafe { llama_cpp_4::log_set(Some(forward), std::ptr::null_mut()) };
}

#[expect(unsafe_code, reason = "called by C with a C string")]
unsafe extern "C" fn forward(level: u32, text: *const c_char, _: *mut c_void) {
    const WARN: u32 = 3;
    const ERROR: u32 = 4;
    if (level != WARN && level != ERROR) || text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated string that lives for the duration of the call.
    let text = unsafe { CStr::from_ptr(text) };
    let _ = writeln!(std::io::stderr(), "{}", text.to_string_lossy().trim_end());
}
