//! Random numbers, from the kernel or from the simulation's seed.

/// So many random bytes.
///
/// # Panics
/// If the kernel has none to give, which Linux rules out after boot.
pub fn bytes<const N: usize>() -> [u8; N] {
    #[cfg(feature = "testing")]
    if let Some(simulated) = crate::world::random_bytes() {
        return simulated;
    }
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

/// An id that sorts by the time of its making: a UUID of version 7.
pub fn id() -> [u8; 16] {
    let millis = u64::try_from(crate::clock::unix_millis()).unwrap_or(0);
    uuid::Builder::from_unix_timestamp_millis(millis, &bytes()).into_uuid().into_bytes()
}
