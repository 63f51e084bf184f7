//! Who is who: TLS 1.3 settings of both sides, and the agent's identity in its certificate.
//!
//! Read first: [`AgentIdentity`], then [`server_config`] and [`client_config`].

use std::sync::Arc;
use std::time::Duration;

use backhaul_protocol::ids::{AgentId, GroupId};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::store::log::UnixMillis;
use backhaul_protocol::wire::ALPN;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509CertificationRequest};

use crate::authority::{AgentKey, Authority, Credentials, RENEWAL_GRACE};

/// Certificates or keys that are not usable.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM text without what it should hold.
    #[error("unusable PEM: {0}")]
    Pem(&'static str),
    /// A certificate that no authority of Backhaul made.
    #[error("not a certificate of a Backhaul agent")]
    NotAnAgent,
    /// From rcgen.
    #[error("can't make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// From rustls.
    #[error("TLS settings: {0}")]
    Rustls(#[from] rustls::Error),
    /// From rustls.
    #[error("TLS settings: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// All certificates in a PEM text.
pub fn certificates_from_pem(pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| TlsError::Pem("not a certificate"))
}

/// What an agent's certificate says of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AgentIdentity {
    /// Its id.
    pub agent: AgentId,
    /// The only group that it may touch.
    pub group: GroupId,
    /// What it may do there.
    pub role: AgentRole,
    /// BLAKE3 of its public key.
    pub key_hash: [u8; 32],
    /// The end of the certificate.
    pub not_after: UnixMillis,
}

pub(crate) fn agent_uri(agent: AgentId, group: GroupId, role: AgentRole) -> String {
    let role = match role {
        AgentRole::Writer => "writer",
        AgentRole::RestoreOnly => "restore-only",
    };
    format!("backhaul:agent:{agent}:{group}:{role}")
}

fn parse_agent_uri(uri: &str) -> Option<(AgentId, GroupId, AgentRole)> {
    let mut parts = uri.strip_prefix("backhaul:agent:")?.split(':');
    let (agent, group, role) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?);
    let role = match role {
        "writer" => AgentRole::Writer,
        "restore-only" => AgentRole::RestoreOnly,
        _ => return None,
    };
    parts.next().is_none().then_some((agent, group, role))
}

/// Reads the identity out of a certificate that TLS has verified already.
pub fn agent_identity(certificate: &[u8]) -> Result<AgentIdentity, TlsError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| TlsError::NotAnAgent)?;
    let names = parsed.subject_alternative_name().ok().flatten().ok_or(TlsError::NotAnAgent)?;
    let [GeneralName::URI(uri)] = names.value.general_names[..] else { return Err(TlsError::NotAnAgent) };
    let (agent, group, role) = parse_agent_uri(uri).ok_or(TlsError::NotAnAgent)?;
    let key_hash = *blake3::hash(parsed.tbs_certificate.subject_pki.raw).as_bytes();
    let not_after = UnixMillis(parsed.validity().not_after.timestamp().saturating_mul(1000));
    Ok(AgentIdentity { agent, group, role, key_hash, not_after })
}

/// BLAKE3 of the public key in a certificate request.
pub fn request_key_hash(request: &[u8]) -> Result<[u8; 32], TlsError> {
    let (_, parsed) = X509CertificationRequest::from_der(request).map_err(|_| TlsError::NotAnAgent)?;
    Ok(*blake3::hash(parsed.certification_request_info.subject_pki.raw).as_bytes())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(Arc::new(roots))
}

/// TLS of a receiver: asks every client for a certificate of its own authority. A client without one gets in too,
/// and may only join.
pub fn server_config(authority: &Authority, own: Credentials) -> Result<rustls::ServerConfig, TlsError> {
    let inner = WebPkiClientVerifier::builder_with_provider(roots(authority.certificate())?, provider())
        .allow_unauthenticated()
        .build()?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(GraceVerifier { inner }))
        .with_single_cert(own.chain, own.key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.max_early_data_size = 0;
    Ok(config)
}

/// How an agent knows the receiver.
pub enum ReceiverTrust {
    /// By the authority's certificate, kept since it joined.
    Authority(CertificateDer<'static>),
    /// By the fingerprint in a join token.
    Fingerprint([u8; 32]),
}

/// TLS of an agent; `own` is its certificate chain and key, unless it is just joining.
pub fn client_config(
    trust: ReceiverTrust,
    own: Option<(Vec<CertificateDer<'static>>, &AgentKey)>,
) -> Result<rustls::ClientConfig, TlsError> {
    let verifier: Arc<dyn ServerCertVerifier> = match trust {
        ReceiverTrust::Authority(certificate) => {
            WebPkiServerVerifier::builder_with_provider(roots(&certificate)?, provider()).build()?
        }
        ReceiverTrust::Fingerprint(fingerprint) => Arc::new(FingerprintVerifier { fingerprint }),
    };
    let builder = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match own {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key.private_key())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_early_data = false;
    Ok(config)
}

/// Lets in certificates that ended less than [`RENEWAL_GRACE`] ago. The receiver reads `not_after` itself and lets
/// such an agent do nothing but renew.
#[derive(Debug)]
struct GraceVerifier {
    inner: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for GraceVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }
    fn client_auth_mandatory(&self) -> bool {
        false
    }
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verdict = self.inner.verify_client_cert(end_entity, intermediates, now);
        let ended = matches!(
            verdict,
            Err(rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }))
        );
        if !ended {
            return verdict;
        }
        let Ok(identity) = agent_identity(end_entity) else { return verdict };
        let end = Duration::from_millis(identity.not_after.0.max(0) as u64);
        if Duration::from_secs(now.as_secs()).saturating_sub(end) >= RENEWAL_GRACE {
            return verdict;
        }
        // As on its last day. Any fixed time back would be before its first one: the grace is longer than its life.
        self.inner.verify_client_cert(end_entity, intermediates, UnixTime::since_unix_epoch(end))
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Trusts the authority that the token names, if the receiver shows its certificate.
#[derive(Debug)]
struct FingerprintVerifier {
    fingerprint: [u8; 32],
}

impl ServerCertVerifier for FingerprintVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let named = intermediates.iter().find(|c| *blake3::hash(c).as_bytes() == self.fingerprint);
        let roots = roots(&named.ok_or_else(unknown)?.clone().into_owned()).map_err(|_| unknown())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider()).build().map_err(|_| unknown())?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp, now)
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
