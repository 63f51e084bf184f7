//! Random numbers, from the kernel.

/// So many random bytes.
///
/// # Panics
/// If the kernel has none to give, which Linux rules out after boot.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut out = [0; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut out[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => panic!("getrandom: {e}"),
        }
    }
    out
}

/// A random number that is not zero.
pub fn number() -> u32 {
    u32::from_le_bytes(bytes()).max(1)
}
