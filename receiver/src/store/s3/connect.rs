//! How the SDK is set up. Every line here closes a trap; see the comments.

use std::fmt;
use std::time::Duration;

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::meta::region::RegionProviderChain;
use aws_credential_types::provider::{ProvideCredentials as _, SharedCredentialsProvider};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation, StalledStreamProtectionConfig,
};
use backhaul_protocol::limits::MAX_SEGMENT_SIZE;

use super::S3Store;
use super::errors::chain_text;
use crate::store::{Kind, S3Settings, S3Url, StoreError, Verb};

/// Signs requests to servers that have no regions.
const NO_REGION: &str = "us-east-1";
/// Longest that finding credentials and a region may take. Outside of EC2 the SDK gives up on the metadata service
/// after some seconds by itself; arbitrary above that.
const CHAIN_LIMIT: Duration = Duration::from_secs(15);

/// Where the keys come from.
#[derive(Clone)]
pub enum Credentials {
    /// The standard chain: environment, profile, web identity, ECS, EC2. Renewed when they expire.
    Chain,
    /// Given, for tests.
    #[allow(missing_docs, reason = "named as everywhere")]
    Static { access_key: String, secret_key: String },
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credentials::Chain => "Chain",
            Credentials::Static { .. } => "Static(..)",
        })
    }
}

impl S3Store {
    /// Finds region and credentials and sets up a client; does not contact the bucket.
    pub async fn connect(url: &S3Url, settings: &S3Settings, credentials: Credentials) -> Result<Self, StoreError> {
        // The SDK would take these by itself and then speak to them in virtual-host style.
        let from_env = || ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"].into_iter().find_map(env);
        let endpoint = url.endpoint.clone().or_else(from_env);
        let region = find_region(url, endpoint.is_some()).await?;
        let credentials = find_credentials(url, &region, credentials).await?;
        let mut config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(region.clone()))
            .credentials_provider(credentials)
            // The one retry layer is ours.
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts(settings))
            // A reply that stops coming fails long before the limit of a 64 MiB object. Not for uploads: a body from
            // memory is handed over in one piece, so there is no stream to watch; the limit by size catches those.
            .stalled_stream_protection(
                StalledStreamProtectionConfig::enabled().upload_enabled(false).grace_period(settings.stall).build(),
            )
            // Not `when_required`: with that the SDK (1.157) names the algorithm of a PUT and leaves out the checksum
            // itself, so that nothing is compared and Object Lock refuses the PUT. What `when_supported` is known to
            // break are trailing checksums of streams, which several compatible servers do not know. There are none:
            // every body is in memory, and its checksum a plain header.
            .request_checksum_calculation(RequestChecksumCalculation::WhenSupported)
            // Compared where `get` asks for it. Parts of objects have no checksum.
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            // Other servers rarely have a DNS name per bucket.
            .force_path_style(endpoint.is_some());
        config.set_endpoint_url(endpoint.clone());
        Ok(Self {
            client: Client::from_conf(config.build()),
            prefix: if url.prefix.is_empty() { String::new() } else { format!("{}/", url.prefix) },
            endpoint: endpoint.unwrap_or_else(|| format!("S3 in {region}")),
            url: url.clone(),
            settings: settings.clone(),
        })
    }
}

/// By itself the SDK waits forever once it is connected. These know no sizes, so they are those of the largest object;
/// `S3Store::within` bounds each request more tightly. The read limit counts from the start of the request, so it must
/// leave time for the upload.
fn timeouts(settings: &S3Settings) -> TimeoutConfig {
    let longest = settings.limit(MAX_SEGMENT_SIZE as usize);
    TimeoutConfig::builder()
        .connect_timeout(settings.connect)
        .read_timeout(longest)
        .operation_attempt_timeout(longest)
        .operation_timeout(longest)
        .build()
}

async fn find_region(url: &S3Url, has_endpoint: bool) -> Result<String, StoreError> {
    let known = url.region.clone().or_else(|| env("AWS_REGION")).or_else(|| env("AWS_DEFAULT_REGION"));
    if let Some(region) = known {
        return Ok(region);
    }
    if has_endpoint {
        return Ok(NO_REGION.to_owned());
    }
    let chain = tokio::time::timeout(CHAIN_LIMIT, async { RegionProviderChain::default_provider().region().await });
    match chain.await {
        Ok(Some(region)) => Ok(region.to_string()),
        _ => {
            let what = "no region is known; add ?region=eu-central-1 (or where the bucket is) or set AWS_REGION";
            Err(StoreError::new(Kind::Config, Verb::Open, url, what))
        }
    }
}

/// Asks for credentials once, so that it is now that their absence is told.
async fn find_credentials(
    url: &S3Url,
    region: &str,
    credentials: Credentials,
) -> Result<SharedCredentialsProvider, StoreError> {
    if let Credentials::Static { access_key, secret_key } = credentials {
        let fixed = aws_sdk_s3::config::Credentials::new(access_key, secret_key, None, None, "given");
        return Ok(SharedCredentialsProvider::new(fixed));
    }
    let missing = || {
        let what = "no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, or \
                    on EC2 give the instance a role";
        StoreError::new(Kind::Permission, Verb::Open, url, what)
    };
    let find = async {
        let chain = DefaultCredentialsChain::builder().region(Region::new(region.to_owned())).build().await;
        chain.provide_credentials().await.map(|found| (chain, found))
    };
    match tokio::time::timeout(CHAIN_LIMIT, find).await {
        Ok(Ok((chain, found))) => {
            check_credentials(url, &found)?;
            Ok(SharedCredentialsProvider::new(chain))
        }
        Ok(Err(error)) => Err(missing().because(chain_text(&error))),
        Err(elapsed) => Err(missing().because(elapsed)),
    }
}

/// The SDK puts them into headers as they are, and panics where that is not possible. A line break at the end is what
/// reading a key from a file leaves.
fn check_credentials(url: &S3Url, found: &aws_sdk_s3::config::Credentials) -> Result<(), StoreError> {
    let parts = [
        ("the access key (AWS_ACCESS_KEY_ID)", Some(found.access_key_id())),
        ("the secret key (AWS_SECRET_ACCESS_KEY)", Some(found.secret_access_key())),
        ("the session token (AWS_SESSION_TOKEN)", found.session_token()),
    ];
    let wrong = |text: &str| text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic());
    // Does not repeat it: it is a secret.
    match parts.iter().find(|(_, text)| text.is_some_and(wrong)) {
        None => Ok(()),
        Some((name, _)) => {
            let what = format!("{name} is empty, or has a space, a line break or another character that no key has");
            Err(StoreError::new(Kind::Permission, Verb::Open, url, what))
        }
    }
}

/// An environment variable that is set and not empty.
fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
