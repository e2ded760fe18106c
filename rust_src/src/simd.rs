//! Running a piece of work with the widest instructions that this processor has, from one plain definition.

/// Work whose `run` and all that it calls is `inline(always)`, so that it is compiled anew for each instruction set.
pub trait Work {
    /// What it returns.
    type Output;

    /// Do it. `F`: multiply and add in one instruction.
    fn run<const F: bool>(self) -> Self::Output;
}

const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

/// Do the work with AVX2 and FMA where the processor has them, else with what the build assumes.
#[inline]
pub fn fastest<W: Work>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: this processor has both features.
        return unsafe { with_avx2(work) };
    }
    work.run::<FUSED>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn with_avx2<W: Work>(work: W) -> W::Output {
    work.run::<true>()
}
