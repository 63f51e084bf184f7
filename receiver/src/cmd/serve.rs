//! `serve`: runs a receiver until SIGTERM.

use std::net::SocketAddr;
use std::sync::Arc;

use backhaul_cli::{Exit, Output};
use backhaul_protocol::store::checkpoint::Sharing;
use backhaul_volume::durable;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::Context;
use crate::catalog::Catalog;
use crate::metering::{Metered, StoreCounts};
use crate::metrics;
use crate::presence::Presence;
use crate::server::Server;

/// Options of `serve`.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Address to listen on; port 0 takes any free one
    #[arg(long, env = "BACKHAUL_LISTEN", value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
}

/// Runs the command.
pub async fn run(args: ServeArgs, ctx: &Context, _out: Output) -> anyhow::Result<Exit> {
    let authority = ctx.authority()?;
    let _lock = durable::lock(&ctx.config.state.join("lock"))?;
    let catalog = ctx.catalog().await?;
    let counts = Arc::<StoreCounts>::default();
    let catalog = Catalog { store: Metered::new(catalog.store, counts.clone()), ..catalog };
    // Without the right to list, what is missing looks forbidden: said now and not to every agent.
    catalog.store.list("", None, 1).await?;
    let presence = match catalog.format.sharing {
        Sharing::ManyReceivers => None,
        Sharing::OneReceiver => Some(Presence::claim(catalog.store.clone()).await?),
    };
    let mut settings = ctx.config.server.clone();
    settings.listen = args.listen.unwrap_or(settings.listen);
    let metrics = settings.metrics;
    let server = Server::bind(catalog, authority, settings)?;
    if let Some(at) = metrics {
        metrics::start(at, server.shared(), counts).await;
    }
    // Handlers before the line that says so: who reads it may send a signal at once.
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let local = server.local_addr()?;
    {
        use std::io::Write;
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "listening on {local}")?;
        stdout.flush()?;
    }
    let running = tokio::spawn(server.run(stop.clone()));
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    stop.cancel();
    running.await?;
    if let Some(presence) = presence {
        presence.leave().await;
    }
    Ok(Exit::Done)
}
