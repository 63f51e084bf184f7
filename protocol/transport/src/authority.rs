//! The receiver's own certificate authority: made once at `init`, it vouches for receivers and agents.
//!
//! Read first: [`Authority`]. Agents never see an address in a certificate: all receivers of one authority have the
//! same name ([`backhaul_protocol::wire::SERVER_NAME`]).

use std::time::{Duration, SystemTime};

use backhaul_protocol::ids::{AgentId, GroupId};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::wire::SERVER_NAME;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::tls::{TlsError, agent_uri, request_key_hash};

const DAY: Duration = Duration::from_secs(86_400);
/// Authority: longer than any server lives; a new one means that every agent joins again.
const AUTHORITY_LIFE: Duration = Duration::from_secs(20 * 365 * 86_400);
/// Receivers make a certificate for themselves at every start.
const RECEIVER_LIFE: Duration = Duration::from_secs(365 * 86_400);
/// Agents renew at two thirds of this (7 to 30 days is the usual span for machine certificates).
pub const AGENT_LIFE: Duration = Duration::from_secs(30 * 86_400);
/// How long after its end a certificate may still be renewed, unless it was revoked: a server that was off for a
/// month comes back by itself.
pub const RENEWAL_GRACE: Duration = Duration::from_secs(90 * 86_400);

/// Signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    reset_key: [u8; 32],
}

/// A certificate chain and its key, ready for TLS.
pub struct Credentials {
    /// Own certificate first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

impl Authority {
    /// A new one; both as PEM: (certificate, key).
    pub fn generate(now: SystemTime) -> Result<(String, String), TlsError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("Backhaul authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - DAY).into();
        params.not_after = (now + AUTHORITY_LIFE).into();
        let certificate = params.self_signed(&key)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// From what [`Self::generate`] gave.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, TlsError> {
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, KeyPair::from_pem(key_pem)?)?;
        let certificate = crate::tls::certificates_from_pem(certificate_pem)?.into_iter().next();
        let certificate = certificate.ok_or(TlsError::Pem("no certificate"))?;
        // Of the key and not of its text: a line end more makes no other receiver of it.
        let reset_key = blake3::derive_key("backhaul 2026-11 stateless resets", issuer.key().serialized_der());
        Ok(Self { issuer, certificate, certificate_pem: certificate_pem.to_owned(), reset_key })
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }
    /// Its certificate as PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }
    /// What all receivers of this authority know, and nobody else: the key of stateless resets.
    pub fn reset_key(&self) -> [u8; 32] {
        self.reset_key
    }
    /// What a join token names it by.
    pub fn fingerprint(&self) -> [u8; 32] {
        *blake3::hash(&self.certificate).as_bytes()
    }

    /// For a receiver.
    pub fn issue_receiver(&self, now: SystemTime) -> Result<Credentials, TlsError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
        params.distinguished_name = name("Backhaul receiver");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.not_before = (now - DAY).into();
        params.not_after = (now + RECEIVER_LIFE).into();
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Credentials {
            chain: vec![certificate.der().clone(), self.certificate.clone()],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        })
    }

    /// For the key in an agent's request (PKCS#10, DER); nothing else of the request is believed. Gives the chain and
    /// the hash of the key.
    pub fn issue_agent(
        &self,
        request: &[u8],
        agent: AgentId,
        group: GroupId,
        role: AgentRole,
        now: SystemTime,
    ) -> Result<(Vec<CertificateDer<'static>>, [u8; 32]), TlsError> {
        let key_hash = request_key_hash(request)?;
        let der = CertificateSigningRequestDer::from(request.to_vec());
        let mut csr = CertificateSigningRequestParams::from_der(&der)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("Backhaul agent");
        let uri = agent_uri(agent, group, role).as_str().try_into()?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = (now - DAY).into();
        params.not_after = (now + AGENT_LIFE).into();
        csr.params = params;
        let certificate = csr.signed_by(&self.issuer)?;
        Ok((vec![certificate.der().clone(), self.certificate.clone()], key_hash))
    }
}

fn name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

/// An agent's key: made on the agent, never leaves it.
pub struct AgentKey(KeyPair);

impl AgentKey {
    /// A new one.
    pub fn generate() -> Result<Self, TlsError> {
        Ok(Self(KeyPair::generate()?))
    }
    /// For the agent's state folder.
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }
    /// From the agent's state folder.
    pub fn from_pem(pem: &str) -> Result<Self, TlsError> {
        Ok(Self(KeyPair::from_pem(pem)?))
    }
    /// A request for a certificate (PKCS#10, DER).
    pub fn request(&self) -> Result<Vec<u8>, TlsError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name("Backhaul agent");
        Ok(params.serialize_request(&self.0)?.der().to_vec())
    }
    /// For TLS.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.serialize_der()))
    }
}
