//! Keeps llama.cpp from multiplying in tiles (AMX), where a CPU could.
//!
//! GCC's `_tile_loadconfig` tells the compiler of eight of the 64 bytes that it reads, and the rest of what ggml has put there is left
//! out: the worker would die of its first prompt (seen with GCC 12.2). ggml asks the kernel for the tiles, and does without where it may
//! not have them. It has no setting for it but one that keeps from all faster layouts.

use crate::log;

/// Has the kernel refuse them to this thread, which loads models, and to those that it starts; false where they cannot be refused.
pub fn refuse() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static ARE_REFUSED: std::sync::LazyLock<bool> = std::sync::LazyLock::new(x86::refuse);
        if !*ARE_REFUSED {
            log::warn("the tiles of this CPU (AMX) cannot be refused to llama.cpp: weights are not repacked");
        }
        *ARE_REFUSED
    }
    #[cfg(not(target_arch = "x86_64"))]
    true
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::__cpuid_count;
    use std::collections::BTreeMap;

    use seccompiler::{
        BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
        TargetArch,
    };

    /// What `arch_prctl` is asked for a part of the CPU's state with.
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    /// In leaf 7 of `cpuid`, whether there are tiles.
    const AMX_TILE: u32 = 1 << 24;

    /// Whether there are none from now on.
    pub fn refuse() -> bool {
        __cpuid_count(7, 0).edx & AMX_TILE == 0
            || filter().and_then(|filter| seccompiler::apply_filter(&filter)).is_ok()
    }

    fn filter() -> Result<BpfProgram, Error> {
        let asked = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, ARCH_REQ_XCOMP_PERM)?;
        let rules = BTreeMap::from([(libc::SYS_arch_prctl, vec![SeccompRule::new(vec![asked])?])]);
        let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, TargetArch::x86_64)?;
        Ok(filter.try_into()?)
    }

    #[cfg(test)]
    #[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
    mod tests {
        use super::*;

        #[test]
        #[expect(unsafe_code, reason = "a system call without a wrapper")]
        fn tiles_are_refused_and_nothing_else() {
            // On a thread of its own: what is refused stays so.
            let asked = std::thread::spawn(|| {
                seccompiler::apply_filter(&filter().unwrap()).unwrap();
                // SAFETY: asks for a part of the CPU's state; takes no pointer.
                let asked = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, 18) };
                (asked, std::io::Error::last_os_error().raw_os_error(), std::fs::read("/proc/self/stat").is_ok())
            });
            assert_eq!(asked.join().unwrap(), (-1, Some(libc::EPERM), true));
        }
    }
}
