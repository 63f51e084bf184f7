//! Settings of the receiver: what was typed becomes what is meant, once.
//!
//! Read first: [`Settings`] (the file), then [`Config`].

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use backhaul_cli::settings::{self, Bytes};
use backhaul_cli::{Exit, Failure};
use clap::Args;
use serde::Deserialize;

use crate::server::ServerSettings;
use crate::store::StoreUrl;

/// Where settings are looked for where none are named.
pub const DEFAULT_FILE: &str = "/etc/backhaul/receiver.toml";
/// Where authority and keys are kept where no other place is named.
pub const DEFAULT_STATE: &str = "/var/lib/backhaul/receiver";

/// The settings file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The store's URL.
    pub store: Option<String>,
    /// The state folder.
    pub state: Option<PathBuf>,
    /// Where `serve` listens.
    pub listen: Option<SocketAddr>,
    /// Where agents reach this receiver, HOST:PORT; goes into join tokens.
    pub advertise: Option<String>,
    /// Memory of open segments and uploads.
    pub memory: Option<Bytes>,
    /// Segments are sealed at this size.
    pub segment_size: Option<Bytes>,
    /// Agents that may be connected at once.
    pub max_sessions: Option<usize>,
    /// Where `serve` answers Prometheus.
    pub metrics: Option<SocketAddr>,
    /// Congestion control of what is sent.
    pub congestion: Option<String>,
    /// Whether the kernel cuts what is sent into packets.
    pub segmentation_offload: Option<bool>,
}

/// What differs between machines.
#[derive(Args, Clone, Debug, Default)]
pub struct PlaceArgs {
    /// The store: file:///path or s3://bucket/prefix[?endpoint=URL&region=NAME]
    #[arg(long, global = true, env = "BACKHAUL_STORE", value_name = "URL")]
    pub store: Option<String>,
    /// Folder of the receiver's authority and keys
    #[arg(long, global = true, env = "BACKHAUL_RECEIVER_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,
}

/// What is meant.
#[derive(Clone, Debug)]
pub struct Config {
    /// The store, if it is known.
    pub store: Option<StoreUrl>,
    /// The state folder.
    pub state: PathBuf,
    /// Where agents reach this receiver.
    pub advertise: Option<String>,
    /// Of `serve`.
    pub server: ServerSettings,
}

impl Config {
    /// From flags and environment, then the file, then defaults.
    pub fn build(file: Option<&Path>, place: &PlaceArgs) -> Result<Self, Failure> {
        let settings: Settings = settings::load(file, Path::new(DEFAULT_FILE))?;
        let wrong = |text: String| Failure::new(Exit::Config, "E_CONFIG", text);
        let store = match place.store.clone().or(settings.store) {
            Some(text) => Some(text.parse::<StoreUrl>().map_err(|e| wrong(e.to_string()))?),
            None => None,
        };
        let defaults = ServerSettings::default();
        let within = |name: &str, value: Option<Bytes>, default: usize, low: u64, high: u64| match value {
            None => Ok(default),
            Some(Bytes(n)) if (low..=high).contains(&n) => Ok(n as usize),
            Some(Bytes(n)) => Err(wrong(format!("{name} = {n}: want from {low} to {high} bytes"))),
        };
        let segment_limit = u64::from(backhaul_protocol::limits::MAX_SEGMENT_SIZE);
        let segment_size =
            within("segment_size", settings.segment_size, defaults.segment_size, 2 << 20, segment_limit)?;
        let memory = within("memory", settings.memory, defaults.memory, 16 << 20, 1 << 40)?;
        if memory < 3 * segment_size {
            return Err(wrong(format!("memory = {memory} is less than three segments of {segment_size} bytes")));
        }
        let max_sessions = settings.max_sessions.unwrap_or(defaults.max_sessions);
        if !(1..=100_000).contains(&max_sessions) {
            return Err(wrong(format!("max_sessions = {max_sessions}: want from 1 to 100000")));
        }
        let tuning = settings::tuning(settings.congestion.as_deref(), settings.segmentation_offload).map_err(wrong)?;
        if let Some(text) = &settings.advertise {
            settings::check_address(text).map_err(|e| wrong(format!("advertise: {e}")))?;
        }
        Ok(Self {
            store,
            state: place.state.clone().or(settings.state).unwrap_or_else(|| DEFAULT_STATE.into()),
            advertise: settings.advertise,
            server: ServerSettings {
                listen: settings.listen.unwrap_or(defaults.listen),
                memory,
                segment_size,
                max_sessions,
                tuning,
                metrics: settings.metrics,
                ..defaults
            },
        })
    }
}
