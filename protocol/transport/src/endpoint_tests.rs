use quinn::congestion::Cubic;
use std::time::SystemTime;

use super::*;
use crate::authority::Authority;
use crate::congestion::Bbr;
use crate::tls::{ReceiverTrust, client_config, server_config};
use crate::tuning::Segmentation;

/// Both ends of a connection over loopback.
async fn connection(tuning: Tuning) -> ([Endpoint; 2], [quinn::Connection; 2]) {
    let now = SystemTime::now();
    let (certificate, key) = Authority::generate(now).expect("a key");
    let authority = Authority::from_pem(&certificate, &key).expect("just made");
    let tls = server_config(&authority, authority.issue_receiver(now).expect("a certificate")).expect("usable");
    let serving = Serving { tls, windows: Windows::BLOCKS, reset_key: [1; 32], tuning };
    let server = Endpoint::server((Ipv4Addr::LOCALHOST, 0).into(), serving).expect("a free port");
    let address = server.local_addr().expect("bound");
    let client = Endpoint::client(address, tuning).expect("a free port");
    let tls = client_config(ReceiverTrust::Fingerprint(authority.fingerprint()), None).expect("usable");
    let accepted = async { server.accept().await.expect("it listens").await.expect("a handshake") };
    let (near, far) = tokio::join!(client.connect(address, tls, Windows::BLOCKS), accepted);
    ([client, server], [near.expect("a handshake"), far])
}

#[tokio::test]
async fn congestion_control_is_what_was_set_at_both_ends() {
    for congestion in [Congestion::Bbr, Congestion::Cubic] {
        for segmentation in [Segmentation::Kernel, Segmentation::Own] {
            let (_endpoints, connections) = connection(Tuning { congestion, segmentation }).await;
            for connection in connections {
                let controller = connection.congestion_state().into_any();
                let is_right = match congestion {
                    Congestion::Bbr => controller.is::<Bbr>(),
                    Congestion::Cubic => controller.is::<Cubic>(),
                };
                assert!(is_right, "{congestion:?}");
            }
        }
    }
}

#[test]
fn small_buffers_are_said_with_what_to_type() {
    assert_eq!(buffer_advice([2 * SOCKET_BUFFER; 2]), None, "the kernel states twice what it gives");
    assert_eq!(buffer_advice([SOCKET_BUFFER, 2 * SOCKET_BUFFER]), None, "half is enough");
    let usual = 2 * 212_992;
    let advice = buffer_advice([usual, usual]).expect("much less than was asked for");
    assert!(advice.contains("208 KiB of the 4096 KiB"), "{advice}");
    assert!(advice.ends_with("sysctl -w net.core.rmem_max=4194304 net.core.wmem_max=4194304"), "{advice}");
    let advice = buffer_advice([usual, 2 * SOCKET_BUFFER]).expect("one is small");
    assert!(!advice.contains("wmem"), "{advice}");
}
