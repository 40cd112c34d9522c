#!/bin/sh
# uninstall.sh - takes the aiapiproxy service off this Mac.
#
#   sudo ./uninstall.sh [--yes | --purge] [--dry-run] [--help]
#
# The service is stopped, then these go: the launchd file, the log rotation, the program.
# Configuration, logs and the account go only if a question is answered with yes; they are asked
# for one by one.  Nothing else is removed, and what is missing already is no error.

set -eu

# Apple's tools only: sudo keeps the caller's PATH, and what lies first there would run as root.
# Where there is no /usr/bin/dscl there is no Mac, only a test that plays one.
if [ -x /usr/bin/dscl ]; then PATH=/usr/bin:/bin:/usr/sbin:/sbin; fi
export PATH
LC_ALL=C
export LC_ALL

LABEL=com.aiapiproxy
DAEMON=/Library/LaunchDaemons/com.aiapiproxy.plist
ENV_FILE=/usr/local/etc/aiapiproxy/.env
STOP_SECONDS=45 # ExitTimeOut of the plist, and 15 for launchd to clear the label

DRY_RUN=no
ANSWER= # yes: --purge; no: --yes; else asked
INCOMPLETE=no

main() { # the reverse of install.sh
    read_options "$@"
    check_prerequisites
    stop_and_unload_service
    remove_launch_daemon
    remove_log_rotation # before the account: a line with an unknown owner stops all of newsyslog
    remove_program
    remove_configuration
    remove_logs
    remove_service_user
    show_the_end
}

# ---- the steps -----------------------------------------------------------------------------------

read_options() {
    for option in "$@"; do
        case $option in
            --dry-run) DRY_RUN=yes ;;
            --yes) ANSWER=${ANSWER:-no} ;;
            --purge) ANSWER=yes ;;
            -h | --help) usage; exit 0 ;;
            *) printf 'uninstall.sh: unknown option: %s (try --help)\n' "$option" >&2; exit 2 ;;
        esac
    done
}

check_prerequisites() {
    [ "$(uname -s)" = Darwin ] ||
        die "this removes a launchd service and works on macOS only;" \
            "elsewhere there is nothing to remove"
    [ "$(id -u)" = 0 ] || die "needs root; run: sudo ./uninstall.sh"
    cd /
}

stop_and_unload_service() { # first, so that running requests still have all files
    step "Stop and unload service"
    waited=0
    job_is_loaded || { say "not loaded $LABEL"; return 0; }
    while job_is_loaded; do
        if is_modern; then
            run launchctl bootout "system/$LABEL" 2>/dev/null || :
        else
            run launchctl unload "$DAEMON" 2>/dev/null || :
        fi
        [ "$DRY_RUN" = no ] || return 0
        job_is_loaded || break # bootout returns before the job has ended
        [ "$waited" -lt "$STOP_SECONDS" ] ||
            die "the service does not end; see: sudo launchctl print system/$LABEL" \
                "- then run this again. Nothing was removed"
        waited=$((waited + 1))
        sleep 1
    done
    say "stopped    $LABEL"
}

remove_launch_daemon() {
    step "Remove files"
    remove_file /Library/LaunchDaemons/com.aiapiproxy.plist
    remove_leftover /Library/LaunchDaemons/com.aiapiproxy.plist.new
}

remove_log_rotation() {
    remove_file /etc/newsyslog.d/aiapiproxy.conf
    remove_leftover /etc/newsyslog.d/aiapiproxy.conf.new
}

remove_program() {
    if [ -L /usr/local/bin/aiapiproxy ]; then
        say "kept       /usr/local/bin/aiapiproxy (a link, not made by install.sh)"
    else
        remove_file /usr/local/bin/aiapiproxy
    fi
    remove_leftover /usr/local/bin/aiapiproxy.new
}

remove_configuration() {
    step "Configuration"
    if ! is_there /usr/local/etc/aiapiproxy; then
        say "not there  /usr/local/etc/aiapiproxy"
    elif wants "Remove the configuration with its keys, /usr/local/etc/aiapiproxy?"; then
        run rm -rf /usr/local/etc/aiapiproxy
        say "removed    /usr/local/etc/aiapiproxy"
    else
        say "kept       /usr/local/etc/aiapiproxy"
    fi
}

remove_logs() {
    step "Logs"
    if ! is_there /usr/local/var/log/aiapiproxy; then
        say "not there  /usr/local/var/log/aiapiproxy"
    elif wants "Remove the logs, /usr/local/var/log/aiapiproxy?"; then
        run rm -rf /usr/local/var/log/aiapiproxy
        say "removed    /usr/local/var/log/aiapiproxy"
    else
        say "kept       /usr/local/var/log/aiapiproxy"
    fi
}

remove_service_user() {
    step "Remove user and group"
    if ! record_exists /Users/_aiapiproxy && ! record_exists /Groups/_aiapiproxy; then
        say "not there  user and group _aiapiproxy"
    elif wants "Remove the user and the group _aiapiproxy?"; then
        disown_what_stays
        delete_record /Users/_aiapiproxy
        delete_record /Groups/_aiapiproxy
    else
        say "kept       user and group _aiapiproxy"
    fi
}

show_the_end() {
    if [ "$DRY_RUN" = yes ]; then printf '\nDry run: nothing was changed.\n'; return 0; fi
    [ "$INCOMPLETE" = no ] ||
        die "not everything could be removed (see above); run this again when that is mended"
    printf '\naiapiproxy is uninstalled.\n'
}

# ---- helpers -------------------------------------------------------------------------------------

# wants QUESTION - yes only by --purge or by a person; without a terminal the answer is no.
wants() {
    case $ANSWER in yes) return 0 ;; no) return 1 ;; esac
    [ -t 0 ] || return 1
    printf '    %s [y/N] ' "$1"
    reply=
    read -r reply || :
    case $reply in [yY] | [yY][eE][sS]) return 0 ;; *) return 1 ;; esac
}

is_there() { [ -e "$1" ] || [ -L "$1" ]; }

remove_file() {
    if is_there "$1"; then
        run rm -f "$1"
        say "removed    $1"
    else
        say "not there  $1"
    fi
}

remove_leftover() { # of an installation that was killed
    if is_there "$1"; then run rm -f "$1"; fi
}

# disown_what_stays - otherwise the files would belong to the next account with the same number.
disown_what_stays() {
    for kept in /usr/local/etc/aiapiproxy /usr/local/var/log/aiapiproxy; do
        if [ -L "$kept" ] || [ ! -d "$kept" ]; then continue; fi
        take_folder "$kept"
        refuse_an_env_with_two_names
        remove_links "$kept"
        run chown -R -h root:wheel "$kept"
    done
}

# take_folder FOLDER - makes root the owner of FOLDER and of each folder in it, outer ones first, so
# that nobody can exchange an entry after the script has checked it.  ACLs are removed, because they
# could still let the service write.
take_folder() {
    if [ "$DRY_RUN" = yes ]; then run chown -h root:wheel "$1"; run chmod go-w "$1"; return 0; fi
    # shellcheck disable=SC2016 # $1 is that of the inner sh
    untaken=$(find "$1" -type d ! -exec sh -c 'chown -h root:wheel "$1" && chmod go-w "$1" &&
        { chmod -N "$1" 2>/dev/null || :; }' sh '{}' ';' -print) || untaken=$1
    [ -z "$untaken" ] || die "can't take $1 for root (see above); mend that, then run again"
}

# refuse_an_env_with_two_names - `chown -R` would give root a file that also lies in another folder.
refuse_an_env_with_two_names() {
    if [ -L "$ENV_FILE" ] || [ ! -f "$ENV_FILE" ]; then return 0; fi
    [ -n "$(find "$ENV_FILE" -prune -links 1)" ] ||
        die "$ENV_FILE has a second name (a hard link): copy it, remove the link, run again"
}

remove_links() { # folders stay, and regular files with one name
    remove_entries "$1" "a symlink" -type l
    remove_entries "$1" "a hard link" -type f ! -links 1
    remove_entries "$1" "neither file nor folder" ! -type f ! -type l ! -type d
}

# remove_entries FOLDER KIND TEST... - removes the names for which find's TEST holds, except .env.
remove_entries() {
    folder=$1 kind=$2
    shift 2
    set -- find "$folder" "$@" ! -path "$ENV_FILE"
    # A name may hold a line break or an escape sequence of the terminal.
    names=$("$@" -print0 | tr '\000\001-\037\177' '\n?')
    [ -n "$names" ] || return 0
    run "$@" -exec rm -f '{}' ';'
    [ "$DRY_RUN" = no ] || return 0
    [ -z "$("$@" -print)" ] || die "can't remove all of this; do so, then run again: $names"
    printf '%s\n' "$names" | while IFS= read -r name; do say "removed    $name ($kind)"; done
}

record_exists() { dscl . -read "$1" >/dev/null 2>&1; }

# delete_record RECORD - one of the two literal names above: without a name dscl deletes them all.
delete_record() {
    case $1 in /Users/_aiapiproxy | /Groups/_aiapiproxy) ;; *) die "refuses to delete '$1'" ;; esac
    if ! record_exists "$1"; then say "not there  $1"; return 0; fi
    status=0
    run dscl . -delete "$1" || status=$?
    case $status in
        0 | 185) say "removed    $1" ;; # 185: somebody else has removed it
        *)
            INCOMPLETE=yes
            warn "macOS does not let $1 be deleted (dscl: $status); allow this terminal Full Disk" \
                "Access in System Settings > Privacy & Security, then: sudo dscl . -delete $1"
            ;;
    esac
}

is_modern() { # bootstrap and bootout, from macOS 11 on
    case $(sw_vers -productVersion 2>/dev/null) in 10.*) return 1 ;; esac
}

job_is_loaded() {
    if is_modern; then
        launchctl print "system/$LABEL" >/dev/null 2>&1
    else
        launchctl list "$LABEL" >/dev/null 2>&1
    fi
}

usage() {
    cat <<'END'
usage: sudo ./uninstall.sh [--yes | --purge] [--dry-run] [--help]

Stops and removes the aiapiproxy service, its program, launchd file and log rotation; then asks,
one by one, for the configuration, the logs, and the account.  Without a terminal they are kept.
  --yes       ask nothing, keep those three
  --purge     ask nothing, remove those three too
  --dry-run   print every command that would change something, and run none
  --help      this text
END
}

step() { printf '\n==> %s\n' "$1"; }
say() { [ "$DRY_RUN" = yes ] || printf '    %s\n' "$1"; }
warn() { printf 'uninstall.sh: warning: %s\n' "$*" >&2; }
die() { printf 'uninstall.sh: %s\n' "$*" >&2; exit 1; }

# run COMMAND... - or, in a dry run, its text.
run() {
    if [ "$DRY_RUN" = yes ]; then printf '    + %s\n' "$*"; else "$@"; fi
}

main "$@"
