//! End to end: the real programs, real QUIC on loopback, real files and devices.

mod bad_input;
<<<<<<< HEAD
mod damage;
=======
mod certificates;
>>>>>>> 6ef8743 (transport, agent: let in certificates that just ended, and renew on sessions that last)
mod devices;
mod hostile;
mod identity;
mod index;
mod log;
mod overload;
mod replicate;
mod restore;
mod resume;
mod s3;
mod service;
mod targets;
<<<<<<< HEAD
mod unwritable;
=======
mod versions;
>>>>>>> 6ef8743 (transport, agent: let in certificates that just ended, and renew on sessions that last)
