#!/bin/sh
# install.sh - makes aiapiproxy a service of this Mac; run it again to repair or to update.
#
#   sudo ./install.sh [--dry-run] [--help]
#
# It creates, in the order of the functions that main() calls:
#
#   user and group       _aiapiproxy (hidden, no password, no shell)
#   program              /usr/local/bin/aiapiproxy
#   configuration        /usr/local/etc/aiapiproxy/.env (only if there is none)
#   logs                 /usr/local/var/log/aiapiproxy/
#   launchd              /Library/LaunchDaemons/com.aiapiproxy.plist
#   log rotation         /etc/newsyslog.d/aiapiproxy.conf
#
# It does not touch a file that is right already, and never an edited .env.  The script may be
# killed at any point and run again; a running service is stopped only after the new files have
# been tested.  The folders of the configuration and of the logs belong to the service, so a
# compromised service may have put links there.  While the script works in these folders they
# belong to root, and it removes the links first.
#
# AIAPIPROXY_PYTHON=/path/python3 names the interpreter to try first.

set -eu

# Only Apple's tools are used: sudo keeps the caller's PATH, so a program in its first folder would
# run as root.  Without /usr/bin/dscl this is not a Mac but a test that simulates one.
if [ -x /usr/bin/dscl ]; then PATH=/usr/bin:/bin:/usr/sbin:/sbin; fi
export PATH
LC_ALL=C
export LC_ALL
unset CDPATH
umask 022 # an administrator's 077 would lock the service out of folders made here

LABEL=com.aiapiproxy
PROGRAM=/usr/local/bin/aiapiproxy
CONFIG_FOLDER=/usr/local/etc/aiapiproxy
ENV_FILE=$CONFIG_FOLDER/.env
LOG_FOLDER=/usr/local/var/log/aiapiproxy
PID_FILE=$LOG_FOLDER/aiapiproxy.pid
DAEMON=/Library/LaunchDaemons/com.aiapiproxy.plist
ROTATION=/etc/newsyslog.d/aiapiproxy.conf
SERVICE=_aiapiproxy:_aiapiproxy

STOP_SECONDS=45   # ExitTimeOut of the plist, and 15 for launchd to clear the label
HEALTH_SECONDS=20 # two starts, with launchd's ThrottleInterval of 10 between them

DRY_RUN=no
HERE=
PYTHON=
SERVICE_UID=
SERVICE_GID=
TAKEN=      # folders of the service that belong to root for now
FOREIGN=    # folders that had another owner
UNFINISHED= # the temporary file
HEALTH_URL=
KEY_IS_MISSING=

main() { # the deployment guide, step by step
    read_options "$@"
    check_prerequisites
    build_the_application     # step 1: nothing is compiled, only tested
    create_service_user       # step 2
    install_application_files # step 3
    configure_environment     # step 4
    install_launch_daemon     # step 5
    install_log_rotation
    load_and_start_service    # step 6
    verify_health
    show_next_steps
}

# ---- the steps -----------------------------------------------------------------------------------

read_options() {
    for option in "$@"; do
        case $option in
            --dry-run) DRY_RUN=yes ;;
            -h | --help) usage; exit 0 ;;
            *) printf 'install.sh: unknown option: %s (try --help)\n' "$option" >&2; exit 2 ;;
        esac
    done
}

check_prerequisites() {
    [ "$(uname -s)" = Darwin ] ||
        die "this installs a launchd service and works on macOS only;" \
            "elsewhere run: python3 aiapiproxy.py"
    [ "$(id -u)" = 0 ] || die "needs root; run: sudo ./install.sh"
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' HUP TERM
    step "Prerequisites"
    HERE=$(folder_of_this_script)
    cd /
    for name in aiapiproxy.py com.aiapiproxy.plist env.example; do
        [ -s "$HERE/$name" ] ||
            die "$name does not lie beside install.sh; run it from a complete copy of aiapiproxy"
    done
    for tool in awk chmod chown cmp curl dscl find launchctl mkdir mv plutil sed tail tr; do
        command -v "$tool" >/dev/null 2>&1 ||
            die "the command '$tool' is missing; it belongs to macOS, so look at PATH and try again"
    done
    PYTHON=$(find_python as_root)
    [ -n "$PYTHON" ] || die_without_python
    [ "$PYTHON" = "${AIAPIPROXY_PYTHON:-}" ] || AIAPIPROXY_PYTHON= # one warning is enough
    say "python     $PYTHON"
}

build_the_application() {
    step "Build the Application"
    as_root "$PYTHON" -I -B -c "$COMPILE" "$HERE/aiapiproxy.py" ||
        die "aiapiproxy.py is damaged (see above); fetch it again. Nothing was changed"
    as_root "$PYTHON" -I -B "$HERE/aiapiproxy.py" --help >/dev/null ||
        die "aiapiproxy.py --help fails with $PYTHON (see above); fetch it again." \
            "Nothing was changed"
    lint "$HERE/com.aiapiproxy.plist"
    say "proven     aiapiproxy.py, com.aiapiproxy.plist"
}

create_service_user() { # the group first, the user's id last: a user without one is unfinished
    step "Create Service User"
    ensure_record /Groups/_aiapiproxy
    ensure /Groups/_aiapiproxy RealName "AI API Proxy Service Group"
    ensure /Groups/_aiapiproxy Password '*'
    SERVICE_UID=$(attribute /Users/_aiapiproxy UniqueID)
    SERVICE_GID=$(attribute /Groups/_aiapiproxy PrimaryGroupID)
    if [ -z "$SERVICE_GID" ]; then
        claim_id /Groups/_aiapiproxy PrimaryGroupID "$SERVICE_UID"
        SERVICE_GID=$CLAIMED
    fi
    ensure_record /Users/_aiapiproxy
    ensure /Users/_aiapiproxy UserShell /usr/bin/false
    ensure /Users/_aiapiproxy RealName "AI API Proxy Service"
    ensure /Users/_aiapiproxy NFSHomeDirectory /var/empty
    ensure /Users/_aiapiproxy Password '*' # -passwd would set the password "*"
    [ -n "$(attribute /Users/_aiapiproxy IsHidden)" ] ||
        directory -create /Users/_aiapiproxy IsHidden 1 || :
    # 20, the guide's primary group, is staff: everybody's.  A finished account keeps what it has.
    if [ -n "$SERVICE_UID" ]; then
        ensure /Users/_aiapiproxy PrimaryGroupID "$SERVICE_GID"
    elif [ "$(attribute /Users/_aiapiproxy PrimaryGroupID)" != "$SERVICE_GID" ]; then
        directory -create /Users/_aiapiproxy PrimaryGroupID "$SERVICE_GID" || die_of_directory $?
    fi
    if [ -z "$SERVICE_UID" ]; then
        claim_id /Users/_aiapiproxy UniqueID "$SERVICE_GID"
        SERVICE_UID=$CLAIMED
        say "created    user _aiapiproxy ($SERVICE_UID), group _aiapiproxy ($SERVICE_GID)"
    else
        say "unchanged  user _aiapiproxy ($SERVICE_UID), group _aiapiproxy ($SERVICE_GID)"
    fi
    case " $(attribute /Groups/_aiapiproxy GroupMembership) " in
        *" _aiapiproxy "*) ;;
        *)
            directory -merge /Groups/_aiapiproxy GroupMembership _aiapiproxy ||
                die_of_directory $?
            ;;
    esac
    wait_for_account
}

install_application_files() {
    step "Install Application Files"
    if [ "$DRY_RUN" = no ]; then # again, now that the user is there who must be able to run it
        PYTHON=$(find_python as_service)
        [ -n "$PYTHON" ] || die_without_python
    fi
    make_folder /usr/local/bin
    take_folder "$CONFIG_FOLDER"
    refuse_an_env_with_two_names
    take_folder "$LOG_FOLDER"
    for folder in "$CONFIG_FOLDER" "$LOG_FOLDER"; do remove_links "$folder"; done
    install_file "$PROGRAM" "$SERVICE" 755 prove_program \
        sed "1s|.*|#!$PYTHON|" "$HERE/aiapiproxy.py"
    for log in "$LOG_FOLDER/stdout.log" "$LOG_FOLDER/stderr.log"; do prepare_log "$log"; done
    give_folder_back "$LOG_FOLDER"
}

configure_environment() {
    step "Configure Environment"
    if [ -L "$ENV_FILE" ]; then
        say "kept       $ENV_FILE (a link: its target must be readable for _aiapiproxy)"
    elif [ -s "$ENV_FILE" ] && ! cmp -s "$HERE/env.example" "$ENV_FILE"; then
        secure "$ENV_FILE" "$SERVICE" 600
        say "kept       $ENV_FILE"
    else # there is none, or the empty one of an interrupted copy
        install_file "$ENV_FILE" "$SERVICE" 600 no_proof cat "$HERE/env.example"
    fi
    # The settings are read now, because later the service could put a link in the place of .env.
    HEALTH_URL=$(health_url)
    case $(env_text) in *your-openai-api-key-here*) KEY_IS_MISSING=yes ;; esac
    give_folder_back "$CONFIG_FOLDER"
}

install_launch_daemon() {
    step "Install Launch Daemon"
    make_folder /Library/LaunchDaemons
    install_file "$DAEMON" root:wheel 644 lint cat "$HERE/com.aiapiproxy.plist"
}

install_log_rotation() { # B: no line of newsyslog's own in a JSON log; 1, SIGHUP, has it reopened
    step "Log Rotation"
    make_folder /etc/newsyslog.d
    install_file "$ROTATION" root:wheel 644 no_proof printf '%s\n' \
        "# logfilename [owner:group] mode count size when flags [/pid_file] [sig_num]" \
        "$LOG_FOLDER/stdout.log $SERVICE 640 7 1000 * BJ $PID_FILE 1" \
        "$LOG_FOLDER/stderr.log $SERVICE 640 7 1000 * BJ $PID_FILE 1"
}

load_and_start_service() {
    step "Load and Start the Service"
    refuse_a_foreign_listener
    run launchctl enable "system/$LABEL" || :
    if service_is_current; then
        say "unchanged  the service runs (pid $(job_pid))"
        return 0
    fi
    stop_service
    start_service
    say "started    $LABEL"
}

verify_health() { # an answer of our own process is the only success: launchctl's exit codes lie
    step "Health Check"
    if [ "$DRY_RUN" = yes ]; then run curl "$HEALTH_URL"; return 0; fi
    seconds=0
    until answers_as_our_job; do
        seconds=$((seconds + 1))
        [ "$seconds" -le "$HEALTH_SECONDS" ] || die_unhealthy
        sleep 1
    done
    say "healthy    $HEALTH_URL"
}

show_next_steps() {
    if [ "$DRY_RUN" = yes ]; then printf '\nDry run: nothing was changed.\n'; return 0; fi
    printf '\naiapiproxy is installed. Next:\n\n'
    if [ -n "$KEY_IS_MISSING" ]; then
        printf '  put in your key:    sudo nano %s\n' "$ENV_FILE"
        printf '  and have it read:   sudo launchctl kill SIGHUP system/%s\n' "$LABEL"
    fi
    printf '  check the set-up:   sudo -u _aiapiproxy %s --check\n' "$PROGRAM"
    printf '  use Claude Code:    ANTHROPIC_BASE_URL=%s claude\n' "${HEALTH_URL%/health}"
    printf '  watch the log:      sudo tail -f %s/stdout.log\n' "$LOG_FOLDER"
}

# ---- accounts ------------------------------------------------------------------------------------

# directory ARGUMENT... - dscl on the local node; its passing failures are tried again.
directory() {
    tries=0
    while :; do
        dscl_status=0
        run dscl . "$@" || dscl_status=$?
        tries=$((tries + 1))
        case $dscl_status in
            137 | 140) # killed; "not implemented"
                [ "$tries" -lt 10 ] || return "$dscl_status"
                sleep 1
                ;;
            *) return "$dscl_status" ;;
        esac
    done
}

# attribute RECORD KEY - the value, or nothing.  dscl prints it after "KEY: ", or if it contains a
# blank, on a line of its own after one blank.
attribute() {
    found=$(dscl . -read "$1" "$2" 2>/dev/null) || return 0
    case $found in *"$2:"*) ;; *) return 0 ;; esac
    found=${found#*"$2:"}
    found=${found#?}
    printf '%s\n' "${found# }"
}

ensure_record() {
    dscl . -read "$1" >/dev/null 2>&1 || directory -create "$1" || die_of_directory $?
}

# ensure RECORD KEY VALUE - what an administrator has set stays.
ensure() {
    [ -n "$(attribute "$1" "$2")" ] || directory -create "$1" "$2" "$3" || die_of_directory $?
}

# claim_id RECORD KEY PREFERRED - sets CLAIMED.  PREFERRED is the id that the other record has.
claim_id() {
    CLAIMED=
    if [ -n "$3" ] && [ "$3" -ge 300 ] && [ "$3" -le 499 ] && is_unused "$2" "$3"; then
        try_id "$1" "$2" "$3"
    fi
    number=499 # downwards: Apple takes new ids from the bottom
    while [ -z "$CLAIMED" ]; do
        [ "$number" -ge 300 ] ||
            die "no number from 300 to 499 is free as user and as group id;" \
                "remove an unused account, then run again"
        if is_unused UniqueID "$number" && is_unused PrimaryGroupID "$number"; then
            try_id "$1" "$2" "$number"
        fi
        number=$((number - 1))
    done
}

# try_id RECORD KEY NUMBER - 55 says that an account which dscl does not list has it.
try_id() {
    id_status=0
    directory -create "$1" "$2" "$3" || id_status=$?
    case $id_status in
        0) CLAIMED=$3 ;;
        55) ;;
        *) die_of_directory "$id_status" ;;
    esac
}

# is_unused KEY NUMBER - neither here nor in a company's directory.
is_unused() {
    records=/Users
    [ "$1" = UniqueID ] || records=/Groups
    for node in . /Search; do
        [ -z "$(dscl "$node" -search "$records" "$1" "$2" 2>/dev/null)" ] || return 1
    done
    case "$1 $(id "$2" 2>/dev/null)" in "UniqueID uid=$2("*) return 1 ;; esac
}

wait_for_account() { # opendirectoryd caches for a moment that there was no such user
    [ "$DRY_RUN" = no ] || return 0
    tries=0
    until id -u _aiapiproxy >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -le 15 ] ||
            die "macOS does not know the new user _aiapiproxy yet; run this again," \
                "after a restart if need be"
        dscacheutil -flushcache 2>/dev/null || :
        sleep 1
    done
}

# ---- files ---------------------------------------------------------------------------------------

# install_file FILE OWNER MODE PROOF COMMAND... - FILE gets COMMAND's output, whole or not at all.
install_file() {
    file=$1 owner=$2 mode=$3 proof=$4
    shift 4
    [ ! -d "$file" ] || die "$file is a folder; move it away and run again"
    if has_one_name "$file" && "$@" | cmp -s - "$file"; then
        secure "$file" "$owner" "$mode"
        say "unchanged  $file"
        return 0
    fi
    write_new "$file.new" "$@"
    run chown "$owner" "$file.new"
    run chmod "$mode" "$file.new"
    strip_quarantine "$file.new"
    "$proof" "$file.new"
    run mv -f "$file.new" "$file"
    UNFINISHED=
    say "installed  $file"
}

# write_new FILE COMMAND... - writes a new file that only root can read until it is complete.
# A link that somebody has put there is not followed.
write_new() {
    target=$1
    shift
    [ ! -d "$target" ] || die "$target is a folder; move it away and run again"
    run rm -f "$target"
    if [ "$DRY_RUN" = yes ]; then
        printf '    +%s >%s\n' "$(quoted "$@")" "$(quoted "$target")"
        return 0
    fi
    UNFINISHED=$target
    (umask 077 && set -C && "$@" >"$target") ||
        die "can't write $target; make room or look at the folder's permissions, then run again"
}

# secure FILE OWNER MODE - puts right what differs, and touches nothing else.
secure() {
    strip_quarantine "$1"
    is_owned "$1" "$2" || run chown "$2" "$1"
    [ -n "$(find "$1" -prune -perm "$3")" ] || run chmod "$3" "$1"
}

# is_owned FILE OWNER - by number, for find knows no user that is only just made.
is_owned() {
    case $2 in
        root:wheel) [ -n "$(find "$1" -prune -user 0 -group 0 -print)" ] ;;
        *) [ -n "$(find "$1" -prune -user "$SERVICE_UID" -group "$SERVICE_GID" -print)" ] ;;
    esac
}

has_one_name() { # a regular file without hard links, so it lies in no other folder too
    [ -n "$(find "$1" -prune -type f -links 1 2>/dev/null)" ]
}

strip_quarantine() { # launchd refuses a plist that carries it; most files don't
    run xattr -d com.apple.quarantine "$1" 2>/dev/null || :
}

make_folder() { # one that is there keeps its owner and mode: Homebrew may own it
    [ -d "$1" ] || run mkdir -p "$1"
}

prepare_log() { # launchd opens it as root or as the user: made beforehand, it suits both
    if has_one_name "$1"; then
        secure "$1" "$SERVICE" 640
    else
        install_file "$1" "$SERVICE" 640 no_proof :
    fi
}

lint() {
    case $1 in *.new) [ "$DRY_RUN" = no ] || { run plutil -lint "$1"; return 0; } ;; esac
    lint_says=$(plutil -lint "$1" 2>&1) ||
        die "$lint_says; fetch com.aiapiproxy.plist again. The service was not touched"
}

prove_program() { # the way launchd starts it: first line, interpreter and user
    [ "$DRY_RUN" = no ] || { run sudo -u _aiapiproxy "$1" --version; return 0; }
    case $(as_service "$1" --version) in
        "aiapiproxy "*) ;;
        *)
            die "the user _aiapiproxy can't run $1 (see above); every folder above it and above" \
                "$PYTHON must be open to all (chmod o+rx). The service was not touched"
            ;;
    esac
}

no_proof() { :; }

# ---- folders of the service ----------------------------------------------------------------------
#
# The service may write into its folders, so root must not trust their entries.  A symlink would
# make root write into another folder; a hard link is a file of another folder, and `chown -R` would
# give it to the service.

# take_folder FOLDER - makes root the owner of FOLDER and of each folder in it, outer ones first, so
# that nobody can exchange an entry after the script has checked it.  ACLs are removed, because they
# could still let the service write.
take_folder() {
    [ ! -L "$1" ] || die "$1 is a link; make it a folder and run again"
    if [ ! -d "$1" ]; then
        run mkdir -p "$1"
    elif is_owned "$1" "$SERVICE"; then
        TAKEN="$TAKEN $1"
    else
        FOREIGN="$FOREIGN $1"
    fi
    if [ "$DRY_RUN" = yes ]; then run chown -h root:wheel "$1"; run chmod go-w "$1"; return 0; fi
    # shellcheck disable=SC2016 # $1 is that of the inner sh
    untaken=$(find "$1" -type d ! -exec sh -c 'chown -h root:wheel "$1" && chmod go-w "$1" &&
        { chmod -N "$1" 2>/dev/null || :; }' sh '{}' ';' -print) || untaken=$1
    [ -z "$untaken" ] || die "can't take $1 for root (see above); mend that, then run again"
}

# refuse_an_env_with_two_names - refuses a .env that is no file, too.  A symlink stays; root does
# not follow it.
refuse_an_env_with_two_names() {
    if [ -L "$ENV_FILE" ] || [ ! -e "$ENV_FILE" ]; then return 0; fi
    [ -f "$ENV_FILE" ] || die "$ENV_FILE is no file: move it away, run again"
    has_one_name "$ENV_FILE" ||
        die "$ENV_FILE has a second name (a hard link): copy it, remove the link, run again"
}

remove_links() { # folders stay, and regular files with one name
    [ -d "$1" ] || return 0 # a dry run
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

# give_folder_back FOLDER - `chown -R` changes the entries of a folder before the folder itself, on
# macOS as on Linux, so the service gets no chance to exchange an entry meanwhile.
give_folder_back() {
    run chown -R -h "$SERVICE" "$1"
    case "$TAKEN " in *" $1 "*) ;; *) run chmod 750 "$1" ;; esac
    case "$FOREIGN " in *" $1 "*) say "owner      $1 is $SERVICE again, as the guide has it" ;; esac
    returned=$1 still_taken=
    for folder in $TAKEN; do
        [ "$folder" = "$returned" ] || still_taken="$still_taken $folder"
    done
    TAKEN=$still_taken
}

# clean_up - runs at every exit.  If the script has failed, the running service needs its folders
# back; their entries may be unchecked, so they keep their owners.
clean_up() {
    [ -z "$UNFINISHED" ] || rm -f "$UNFINISHED"
    [ "$DRY_RUN" = no ] || return 0
    for folder in $TAKEN; do
        find "$folder" -depth -type d -exec chown -h "$SERVICE" '{}' ';' || :
    done
}

# ---- Python --------------------------------------------------------------------------------------

COMPILE='import sys; f = sys.argv[1]; compile(open(f, "rb").read(), f, "exec")'

# 0: good; 4: good but for CA certificates; anything else: not usable.
PROBE='import sys
if sys.version_info < (3, 9): sys.exit(3)
import asyncio, os, ssl
paths = ssl.get_default_verify_paths()
folder = paths.capath if paths.capath and os.path.isdir(paths.capath) else None
roots = ssl.create_default_context().get_ca_certs() or os.path.exists("/etc/ssl/cert.pem")
sys.exit(0 if roots or folder and os.listdir(folder) else 4)'

# find_python RUNNER - prints the first interpreter that RUNNER can use; nothing if there is none.
# Apple's is tried first, because no upgrade of Homebrew moves it.
find_python() {
    runner=$1
    second_best=
    set -- "${AIAPIPROXY_PYTHON:-}" /usr/bin/python3
    for bin in /opt/homebrew/bin /usr/local/bin \
        /Library/Frameworks/Python.framework/Versions/Current/bin; do
        for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do
            set -- "$@" "$bin/$name"
        done
    done
    for candidate in "$@"; do
        fitness=no
        if [ -x "$candidate" ] && is_plain_path "$candidate" && may_be_executed "$candidate"; then
            fitness=0
            "$runner" "$candidate" -I -B -c "$PROBE" >/dev/null 2>&1 </dev/null || fitness=$?
        fi
        case $fitness in
            0) printf '%s\n' "$candidate"; return 0 ;;
            4) second_best=${second_best:-$candidate} ;;
            *) note_unusable "$candidate" ;;
        esac
    done
    printf '%s\n' "$second_best" # without CA certificates: --check tells what to do
}

# is_plain_path PATH - whether PATH can be the interpreter in the first line of a script.  Some
# systems cut that line at a blank and after 127 characters.
is_plain_path() {
    case $1 in
        [!/]* | *[!A-Za-z0-9/._@+-]*) return 1 ;;
        *) [ "${#1}" -le 120 ] ;;
    esac
}

# may_be_executed PATH - Apple's /usr/bin/python3 (or a link to it) opens a dialog instead of
# running while there are no Command Line Tools; asking xcode-select is harmless.
may_be_executed() {
    [ -n "$(find -L "$1" -prune -samefile /usr/bin/python3 2>/dev/null)" ] || return 0
    xcode-select -p >/dev/null 2>&1
}

note_unusable() {
    [ -z "$1" ] || [ "$1" != "${AIAPIPROXY_PYTHON:-}" ] ||
        warn "AIAPIPROXY_PYTHON=$1 is not usable (an absolute path without blanks, 3.9 or newer," \
            "with ssl, open to all users); trying the others"
}

die_without_python() {
    die "no usable Python 3.9 or newer found. Install one and run again: xcode-select --install," \
        "or the installer of python.org, or: brew install python"
}

as_root() { "$@"; }

as_service() {
    if command -v sudo >/dev/null 2>&1; then sudo -u _aiapiproxy "$@"; else "$@"; fi
}

# ---- launchd -------------------------------------------------------------------------------------

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

job_pid() { # nothing while it does not run; print is the newer command, list the older
    { launchctl print "system/$LABEL" || launchctl list "$LABEL"; } 2>/dev/null |
        sed -n -e 's/^[[:space:]]*pid = \([0-9][0-9]*\).*/\1/p' \
            -e 's/^[[:space:]]*"PID" = \([0-9][0-9]*\);.*/\1/p' |
        head -n 1
}

# stop_service - and wait: bootout returns before the job has ended, when a bootstrap would fail.
stop_service() {
    waited=0
    while job_is_loaded; do
        if is_modern; then
            run launchctl bootout "system/$LABEL" 2>/dev/null || :
        else
            run launchctl unload "$DAEMON" 2>/dev/null || :
        fi
        [ "$DRY_RUN" = no ] || return 0
        job_is_loaded || return 0
        [ "$waited" -lt "$STOP_SECONDS" ] ||
            die "the old service does not end; see: sudo launchctl print system/$LABEL" \
                "- then run this again"
        waited=$((waited + 1))
        sleep 1
    done
}

# start_service - RunAtLoad starts the job.  launchd answers "5: Input/output error" for every
# failure, also for one that is over a moment later, so there are up to ten tries.
start_service() {
    if ! is_modern; then
        run launchctl load -w "$DAEMON" || :
        run launchctl start "$LABEL" || :
        return 0
    fi
    if [ "$DRY_RUN" = yes ]; then run launchctl bootstrap system "$DAEMON"; return 0; fi
    tries=1
    until launchctl_says=$(launchctl bootstrap system "$DAEMON" 2>&1) || job_is_loaded; do
        [ "$tries" -lt 10 ] ||
            die "launchctl bootstrap: $launchctl_says - look whether System Settings > General >" \
                "Login Items has aiapiproxy switched off, then run this again"
        tries=$((tries + 1))
        sleep 1
    done
}

# service_is_current - whether it runs, answers, and was started after the last change of its
# files.  A run that was killed before the restart is thereby completed by the next one.
service_is_current() {
    [ -f "$PID_FILE" ] && answers_as_our_job &&
        [ -z "$(find "$PROGRAM" "$DAEMON" "$ENV_FILE" -newer "$PID_FILE" 2>/dev/null)" ]
}

answers_as_our_job() {
    answer=$(curl -q -g -s --noproxy '*' --max-time 3 "$HEALTH_URL" | tr '\n' ' ') || return 1
    case $answer in *'"aiapiproxy"'*) ;; *) return 1 ;; esac
    answer_pid=$(printf '%s\n' "$answer" | sed -n 's/.*"pid": *\([0-9][0-9]*\).*/\1/p')
    [ -n "$answer_pid" ] && is_ours "$answer_pid"
}

# is_ours PID - the job itself, or one of its workers.
is_ours() {
    pid=$(job_pid)
    [ -n "$pid" ] || return 1
    [ "$1" = "$pid" ] || [ "$(ps -o ppid= -p "$1" 2>/dev/null | tr -d ' ')" = "$pid" ]
}

# refuse_a_foreign_listener - before anything is stopped.
refuse_a_foreign_listener() {
    port=${HEALTH_URL%/health}
    port=${port##*:}
    foreign=
    listeners=$(lsof -nP -iTCP:"$port" -sTCP:LISTEN 2>/dev/null | awk 'NR > 1 { print $2 }')
    for listener in $listeners; do
        if is_ours "$listener"; then return 0; fi
        foreign=$listener
    done
    [ -z "$foreign" ] ||
        die "port $port is taken by process $foreign (see: sudo lsof -i :$port); stop it, or set" \
            "another SERVER_PORT in $ENV_FILE, then run this again"
}

health_url() {
    host=$(setting SERVER_HOST 127.0.0.1)
    host=${host%%,*}
    port=$(setting SERVER_PORT 8082)
    case $host in
        0.0.0.0 | '*') host=127.0.0.1 ;;
        :: | '[::]') host='[::1]' ;;
        \[*) ;;
        *:*) host="[$host]" ;;
    esac
    printf 'http://%s:%s/health\n' "$host" "$port"
}

# setting NAME DEFAULT - the value in .env, read as the program reads it; the last line counts.
setting() {
    blank='[[:space:]]'
    beginning="^$blank*\(export$blank$blank*\)\{0,1\}$1$blank*=$blank*"
    value=$(env_text | sed -n "s/$beginning//p" | tail -n 1 |
        sed -e 's/^#.*//' -e "s/$blank#.*//" -e "s/$blank*\$//" -e "s/^[\"']//" -e "s/[\"']\$//")
    printf '%s\n' "${value:-$2}"
}

env_text() { # the text of .env; through a symlink it is read as the service, not as root
    if [ -L "$ENV_FILE" ] && [ -f "$ENV_FILE" ]; then
        as_service cat "$ENV_FILE" 2>/dev/null || :
    elif has_one_name "$ENV_FILE"; then
        cat "$ENV_FILE"
    fi
}

die_unhealthy() {
    launchctl print "system/$LABEL" 2>/dev/null |
        grep -E '^[[:space:]]*(state|last exit code) =' >&2 || :
    # The folder belongs to the service again, so a link there must not show root's files.
    as_service tail -n 20 "$LOG_FOLDER/stderr.log" >&2 || :
    die "the service does not answer at $HEALTH_URL; the reason should stand above, at the end of" \
        "$LOG_FOLDER/stderr.log. Mend it (most often in $ENV_FILE) and run this again"
}

# ---- small things --------------------------------------------------------------------------------

usage() {
    cat <<'END'
usage: sudo ./install.sh [--dry-run] [--help]

Installs aiapiproxy as a launchd service of this Mac, repairs or updates it.
  --dry-run   print every command that would change something, and run none
  --help      this text

AIAPIPROXY_PYTHON=/path/python3 names the interpreter to try first, e.g.
  sudo AIAPIPROXY_PYTHON=/opt/homebrew/bin/python3 ./install.sh
END
}

step() { printf '\n==> %s\n' "$1"; }
say() { [ "$DRY_RUN" = yes ] || printf '    %s\n' "$1"; }
warn() { printf 'install.sh: warning: %s\n' "$*" >&2; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

die_of_directory() {
    case $1 in
        40)
            die "macOS does not let this terminal change accounts (dscl: 40); allow it" \
                "Full Disk Access in System Settings > Privacy & Security, then run this again"
            ;;
        *)
            die "dscl failed with exit code $1 (see above);" \
                "run this again, after a restart if it persists"
            ;;
    esac
}

# run COMMAND... - or, in a dry run, its text.
run() {
    if [ "$DRY_RUN" = yes ]; then printf '    +%s\n' "$(quoted "$@")"; else "$@"; fi
}

quoted() {
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9/._:=@%+,-]*)
                printf " '%s'" "$(printf '%s\n' "$word" | sed "s/'/'\\\\''/g")"
                ;;
            *) printf ' %s' "$word" ;;
        esac
    done
}

folder_of_this_script() {
    case $0 in
        /*) cd "$(dirname "$0")" && pwd ;;
        *) cd "./$(dirname "./$0")" && pwd ;; # ./ for a folder whose name begins with a dash
    esac
}

main "$@"
